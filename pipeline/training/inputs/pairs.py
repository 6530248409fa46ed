"""Pairs of a split as the forward pass reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import IMPORTED_BY, PAIRS, ROUNDING
from pipeline.artifacts.tables import read_about, read_groups
from pipeline.config.losses import sums_do_not_do
from pipeline.errors import ConfigError, DataError
from pipeline.forward.trees import Tree
from pipeline.hardware import return_freed_memory

Item = TypeVar("Item")

# Arrow keeps what it has freed: a million pairs would leave a GiB behind
_GROUPS_TO_RETURN_MEMORY = 8


class Stored(Sequence[Item]):
    """Values made from the rows of columns when they are asked for: a memory-mapped table stays on disk."""

    def __init__(self, columns: Sequence[pa.ChunkedArray], make: Callable[..., Item]) -> None:
        self._columns, self._make = columns, make

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, row: int) -> Item: ...
    @overload
    def __getitem__(self, row: slice) -> list[Item]: ...
    def __getitem__(self, row: int | slice) -> Item | list[Item]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        return self._make(*(column[row] for column in self._columns))


class StoredTrees(Stored[Tree]):
    """Trees of stored pairs; `longest` and `ends` are those of all, found while they were read."""

    def __init__(self, columns: Sequence[pa.ChunkedArray], longest: int, ends: set[int]) -> None:
        super().__init__(columns, _tree)
        self.longest, self.ends = longest, ends


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split, ready for the forward pass; `ref_*_logps` hold per-token values, NaN if nothing was scored.

    `ref_sums`, float64 [2] per pair, stand in their place if scores were imported of which some are sums alone; else none.
    `margins`: how much better chosen is than rejected, if a loss reads it.
    """

    pair_ids: Sequence[str]
    trees: Sequence[Tree]
    ref_chosen_token_logps: Sequence[np.ndarray]
    ref_rejected_token_logps: Sequence[np.ndarray]
    ref_sums: Sequence[np.ndarray] = ()
    margins: Sequence[float] = ()

    def __len__(self) -> int:
        return len(self.pair_ids)

    @property
    def ids(self) -> Sequence[str]:
        """The names of the pairs."""
        return self.pair_ids

    def stored_logps(self, row: int) -> list[np.ndarray]:
        """The reference's logps of every token of both responses, float32."""
        return [self.ref_chosen_token_logps[row], self.ref_rejected_token_logps[row]]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of any pair, a prompt with one response."""
        known = self.trees.longest if isinstance(self.trees, StoredTrees) else None
        return max((tree.longest for tree in self.trees), default=0) if known is None else known

    @property
    def ends(self) -> set[int]:
        """Tokens that end a response of any pair."""
        if isinstance(self.trees, StoredTrees):
            return self.trees.ends
        return {branch[-1] for tree in self.trees for branch in tree.branches}


def load_pairs(path: Path, split: str, *, scored: bool = True, by_token: bool = False, margins: str = "") -> Pairs:
    """Read one split of pairs.parquet; `scored` asks for the reference's scores. What is read stays on disk, memory-mapped.

    Raises DataError if a row's scores do not fit its tokens or its sums, ConfigError if `by_token` asks for values per token and
    only sums were imported, or if `margins`, which names what reads them, asks for margins and a pair has none.
    """
    about = read_about(path)
    imported, rounding = IMPORTED_BY in about, float(about.get(ROUNDING, 0))
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    logps = ["ref_chosen_token_logps", "ref_rejected_token_logps"] if scored else []
    sums = ["ref_chosen_logps", "ref_rejected_logps"] if scored else []
    kept = ["pair_id", *ids, *logps, *(sums if imported else []), *(["margin"] if margins else [])]
    longest, ends, by_sum = 0, set[int](), 0
    with tempfile.NamedTemporaryFile(prefix="split-", dir=durable.scratch_place()) as file:
        schema = pa.schema([PAIRS.field(name) for name in kept])
        with durable.explaining_disk(Path(file.name)), pa.ipc.new_file(file.name, schema) as writer:
            for number, part in enumerate(read_groups(path, PAIRS, ["split", *dict.fromkeys([*kept, *sums])])):
                if number % _GROUPS_TO_RETURN_MEMORY == 0:
                    return_freed_memory()
                here = pc.equal(part["split"], split)
                table = (part if pc.all(here).as_py() else part.filter(here)).combine_chunks()
                if not len(table):
                    continue
                if margins:
                    _must_have_margins(path, table, margins)
                for side in ("chosen", "rejected") if scored else ():
                    _must_fit(path, side, table, rounding, imported=imported)
                    by_sum += table[f"ref_{side}_token_logps"].null_count
                lengths = [pc.list_value_length(table[name]).to_numpy() for name in ids]
                longest = max(longest, int((lengths[0] + np.maximum(lengths[1], lengths[2])).max()))
                for name in ids[1:]:
                    ends |= set(_last_of_each(table[name].combine_chunks()).tolist())
                writer.write_table(table.select(kept).cast(schema))
        # mapped, the file needs no name
        stored = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    return_freed_memory()
    if by_sum and by_token:
        raise ConfigError(sums_do_not_do(f"{by_sum} scores in {path}"))
    trees = StoredTrees([stored[name] for name in ids], longest, ends)
    if scored and not by_sum:
        chosen, rejected = (Stored([stored[name]], _array) for name in logps)
    else:
        chosen, rejected = (Stored([stored[name]], _nothing) for name in ids[1:])
    ref_sums = Stored([stored[name] for name in sums], _both) if by_sum else ()
    how_much_better = Stored([stored["margin"]], lambda value: float(value.as_py())) if margins else ()
    names = Stored([stored["pair_id"]], lambda value: str(value.as_py()))
    return Pairs(names, trees, chosen, rejected, ref_sums, how_much_better)


def _must_have_margins(path: Path, table: pa.Table, reader: str) -> None:
    """Raise ConfigError if a pair has no margin, which `reader` reads."""
    values = table["margin"].to_numpy(zero_copy_only=False).astype(np.float64)
    if not np.isfinite(values).all():
        lacking = table["pair_id"][int(np.argmax(~np.isfinite(values)))]
        raise ConfigError(
            f"{path}: pair {lacking} has no margin, which {reader} reads: the data needs a column margin, or scores of "
            "both responses (docs/data.md), or choose what reads none"
        )


def _last_of_each(lists: pa.ListArray) -> np.ndarray:
    lasts: np.ndarray = lists.values.to_numpy()[lists.offsets.to_numpy()[1:] - 1]
    return np.unique(lasts)


def _array(row: pa.ListScalar) -> np.ndarray:
    values: np.ndarray = row.values.to_numpy(zero_copy_only=False)
    return values


def _both(chosen: pa.DoubleScalar, rejected: pa.DoubleScalar) -> np.ndarray:
    return np.array([chosen.as_py(), rejected.as_py()], np.float64)


def _nothing(row: pa.ListScalar) -> np.ndarray:
    return np.full(len(row.values), np.nan, np.float32)


def _tree(prompt: pa.ListScalar, *responses: pa.ListScalar) -> Tree:
    return Tree(_array(prompt).tolist(), tuple(_array(response).tolist() for response in responses))


def _must_fit(path: Path, side: str, table: pa.Table, rounding: float, *, imported: bool) -> None:
    if imported:
        table = _with_values(path, side, table)
        if not len(table):
            return
    scores = table[f"ref_{side}_token_logps"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(scores), 0).to_numpy()
    values, ends = scores.flatten().to_numpy(), np.cumsum(lengths)
    broken = (lengths == 0) | (lengths != pc.list_value_length(table[f"{side}_ids"]).to_numpy())
    if not (finite := np.isfinite(values)).all():
        broken[np.searchsorted(ends, np.flatnonzero(~finite), side="right")] = True
    if broken.any():
        pair_id = table["pair_id"][int(np.argmax(broken))]
        raise DataError(f"{path}: pair {pair_id} has no whole set of scores for {side}: run precompute again")
    sums = table[f"ref_{side}_logps"].to_numpy(zero_copy_only=False)
    allowed = 1e-6 * (1 + np.abs(sums)) + rounding * lengths
    off = ~(np.abs(np.add.reduceat(values, ends - lengths, dtype=np.float64) - sums) <= allowed)
    if off.any():
        pair_id = table["pair_id"][int(np.argmax(off))]
        raise DataError(f"{path}: pair {pair_id}: ref_{side}_logps is not the sum of ref_{side}_token_logps")


def _with_values(path: Path, side: str, table: pa.Table) -> pa.Table:
    """The rows of imported scores that have values per token. Raises DataError if one of the others has no sum."""
    by_sum = pc.is_null(table[f"ref_{side}_token_logps"])
    sums = table.filter(by_sum)[f"ref_{side}_logps"].to_numpy()
    # written so that a sum that is NaN is none
    if not (sums <= 0).all() or np.isinf(sums).any():
        number = int(np.argmax(~(sums <= 0) | np.isinf(sums)))
        pair_id = table.filter(by_sum)["pair_id"][number]
        raise DataError(f"{path}: pair {pair_id} has no score for {side}: run precompute again")
    return table.filter(pc.invert(by_sum)).combine_chunks()
