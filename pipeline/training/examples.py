"""Pairs of a split as the forward pass reads them, and which of them one forward pass takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow.compute as pc

from pipeline.artifacts.tables import PAIRS, arrays_of, read_table
from pipeline.config.experiment import TrainConfig
from pipeline.errors import DataError
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind


class CountsTokens(Protocol):
    """A pass over trees that knows how much it reads."""

    def tokens(self, trees: Sequence[Tree]) -> int:
        """Tokens that the model reads for `trees`, filling included."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split, ready for the forward pass; `ref_*_logps` hold per-token values, NaN if nothing was scored."""

    pair_ids: list[str]
    trees: list[Tree]
    ref_chosen_logps: list[np.ndarray]
    ref_rejected_logps: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.pair_ids)


def load_pairs(path: Path, split: str, *, scored: bool = True) -> Pairs:
    """Read one split of pairs.parquet; `scored` asks for the reference's scores.

    Raises DataError if a row's scores do not fit its tokens or its sums.
    """
    columns = [
        name for name in PAIRS.names if name.endswith(("_ids", "_logps", "_logp")) or name in ("pair_id", "split")
    ]
    table = read_table(path, PAIRS, columns)
    table = table.filter(pc.equal(table["split"], split))
    ids = {side: arrays_of(table, f"{side}_ids") for side in ("prompt", "chosen", "rejected")}
    pair_ids = table["pair_id"].to_pylist()
    if scored:
        logps = {side: arrays_of(table, f"ref_{side}_logps") for side in ("chosen", "rejected")}
        for side in ("chosen", "rejected"):
            sums = table[f"ref_{side}_logp"].to_numpy()
            _must_fit(path, side, pair_ids, ids[side], logps[side], sums)
    else:
        logps = {side: [np.full(len(row), np.nan, np.float32) for row in ids[side]] for side in ("chosen", "rejected")}
    trees = [
        Tree(prompt.tolist(), (chosen.tolist(), rejected.tolist()))
        for prompt, chosen, rejected in zip(ids["prompt"], ids["chosen"], ids["rejected"], strict=True)
    ]
    return Pairs(pair_ids, trees, logps["chosen"], logps["rejected"])


def micro_batches(
    forward: CountsTokens, pairs: Pairs, rows: Iterable[int], train: TrainConfig, size: int
) -> Iterable[list[int]]:
    """Rows of each forward pass: at most `size` pairs, and `train.tokens_per_batch` tokens of those that `forward` reads for
    them; pairs of one prompt together, similar lengths together. A pair that is longer runs alone.
    """
    budget = train.tokens_per_batch or default_tokens_per_batch()
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(pairs.trees[row].trunk), []).append(row)
    longest_first = sorted(by_prompt.values(), key=lambda same: (-max(len(pairs.trees[row]) for row in same), same))
    group: list[int] = []
    for row in (row for same in longest_first for row in same):
        if group and (len(group) == size or forward.tokens([pairs.trees[each] for each in (*group, row)]) > budget):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def default_tokens_per_batch() -> int:
    """Enough to keep the processor busy, little enough for its memory."""
    return 1024 if device_kind() == "cpu" else 8192


def _must_fit(
    path: Path, side: str, pair_ids: list[str], ids: list[np.ndarray], logps: list[np.ndarray], sums: np.ndarray
) -> None:
    for pair_id, tokens, values, total in zip(pair_ids, ids, logps, sums, strict=True):
        if len(values) != len(tokens) or not np.isfinite(values).all():
            raise DataError(f"{path}: pair {pair_id} has no whole set of scores for {side}: run precompute again")
        if not abs(float(values.sum(dtype=np.float64)) - total) <= 1e-6 * (1 + abs(total)):
            raise DataError(f"{path}: pair {pair_id}: ref_{side}_logp is not the sum of ref_{side}_logps")
