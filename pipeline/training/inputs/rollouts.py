"""Samples of training prompts with their rewards and scores: a prompt with its samples is one example of a training.

What stays in memory is a few numbers per sample; token ids and scores are read from disk when they are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import read_about, read_groups
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.errors import DataError
from pipeline.forward.trees import Tree
from pipeline.training.inputs.grouped import (
    GroupedTrees,
    ends_of,
    in_whole_groups,
    longest_of,
    must_fit,
    starts_of,
    tree_of,
)
from pipeline.training.inputs.pairs import Stored

_IDS = ("prompt_ids", "response_ids")
_KEPT = (*_IDS, "logps", "ref_logps")
_AGAIN = "run 'refscore rollout' again"


@dataclass(frozen=True)
class Rollouts:
    """Prompts that samples can be compared of, each with those that have a reward; S samples in all.

    Samples of prompt `row` are numbers `starts[row]` to `starts[row + 1]` of `rewards` (float64 [S]), `sums_2S` (summed logps under
    the model that wrote them and under the reference, float64), `cut_off` (bool [S]) and of the rows of `samples`. `max_tokens`:
    the longest that a sample could be. `left_out`: samples by why they teach nothing.
    """

    ids: Sequence[str]
    starts: np.ndarray
    rewards: np.ndarray
    sums_2S: np.ndarray
    cut_off: np.ndarray
    samples: pa.Table
    max_tokens: int
    left_out: dict[str, int]
    longest: int
    ends: set[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trees(self) -> Sequence[Tree]:
        """The token ids of each prompt with its samples."""
        return GroupedTrees([self.samples[name] for name in _IDS], self.starts)

    @property
    def one_by_one(self) -> Samples:
        """The samples as examples of their own, so that a forward pass takes as many as fit; siblings still share their prompt."""
        return Samples(self)

    def of(self, row: int) -> range:
        """Numbers of the samples of prompt `row`."""
        return range(int(self.starts[row]), int(self.starts[row + 1]))

    def weighed(self, rows: Sequence[int], settings: PolicyGradientConfig) -> Weighed:
        """The samples of the prompts of a step, in which a row may stand twice if it reaches into the next epoch."""
        numbers = [number for row in sorted(set(rows)) for number in self.of(row)]
        weights = np.where(self.cut_off[numbers] & settings.mask_truncated_completions, 0.0, 1.0)
        lengths = pc.list_value_length(self.samples["response_ids"]).to_numpy()[numbers]
        place = {number: at for at, number in enumerate(numbers)}
        every = [place[number] for row in rows for number in self.of(row)]
        return Weighed(numbers, weights, lengths, len(every), max(1.0, float((weights * lengths)[every].sum())))


class Weighed(NamedTuple):
    """Numbers of a step's samples, once each, with their weights (0: teaches nothing) and lengths in tokens; and of the step how
    many `samples` it has and how many `tokens` of those that count, at least 1, with what stands twice counted twice.
    """

    numbers: list[int]
    weights: np.ndarray
    lengths: np.ndarray
    samples: int
    tokens: float


class Samples:
    """The samples of rollouts, by their numbers; see `pipeline.training.inputs.batches.Examples`."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self.trees: Sequence[Tree] = Stored([rollouts.samples[name] for name in _IDS], tree_of)
        self.longest, self.ends = rollouts.longest, rollouts.ends

    def __len__(self) -> int:
        return len(self._rollouts.rewards)

    @property
    def ids(self) -> Sequence[str]:
        """Prompt and number of each sample."""
        starts = self._rollouts.starts
        rows = np.searchsorted(starts, np.arange(len(self)), side="right") - 1
        return [f"{self._rollouts.ids[row]}/{number - starts[row]}" for number, row in enumerate(rows.tolist())]

    def logps(self, number: int, column: str) -> np.ndarray:
        """`logps`, `ref_logps` or `values` of a sample's tokens, float32."""
        values: np.ndarray = self._rollouts.samples[column][number].values.to_numpy(zero_copy_only=False)
        return values


def load_rollouts(path: Path, settings: PolicyGradientConfig, *, for_critic: bool = False) -> Rollouts:
    """Read rollouts.parquet for a loss with `settings`, or for a critic of that; what is read stays on disk, memory-mapped.

    Left out, and counted: samples without a reward, prompts with fewer than two samples that have one, and prompts whose samples
    all have the same reward, unless advantages are measured over the step or a KL to the reference counts; for a critic, or by its
    values, only the first. Raises DataError if scores do not fit their tokens, if the samples of a prompt do not stand together, or
    if none teaches.
    """
    needed = _Needed(settings, for_critic)
    kept_columns = (*_KEPT, "values") if needed.values else _KEPT
    columns = ["prompt_id", "finish_reason", "reward", "logp", "ref_logp", *kept_columns]
    read = _Read()
    left_out = {"without a reward": 0, "alone with a reward": 0, "of equal rewards": 0}
    schema = pa.schema([ROLLOUTS.field(name) for name in kept_columns])
    longest, ends, seen = 0, set[int](), set[str]()
    with tempfile.NamedTemporaryFile(prefix="rollouts-", dir=durable.scratch_place()) as file:
        with durable.explaining_disk(Path(file.name)), pa.ipc.new_file(file.name, schema) as writer:
            for table in in_whole_groups(read_groups(path, ROLLOUTS, columns), "prompt_id"):
                kept = _kept(path, table, needed, seen, left_out)
                if len(kept):
                    longest, ends = max(longest, longest_of(kept)), ends | ends_of(kept)
                    read.add(kept)
                    writer.write_table(kept.select(kept_columns).cast(schema))
        # mapped, the file needs no name
        samples = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not read.ids:
        why = "; ".join(f"{count} samples {reason}" for reason, count in left_out.items()) or "no rows"
        what = "sample has a reward" if needed.alone else "prompt has samples that differ in reward"
        raise DataError(
            f"{path}: no {what} ({why}), so nothing can be learnt: another judge (rollout.judge), or more samples "
            "(rollout.samples)"
        )
    cut_off = np.concatenate(read.cut_off)
    if settings.mask_truncated_completions and cut_off.all():
        raise DataError(
            f"{path}: all {len(cut_off)} samples were cut off, and train.policy_gradient.mask_truncated_completions lets those "
            "teach nothing: set it to false, or sample longer ones (generate.max_tokens)"
        )
    return Rollouts(
        read.ids,
        np.concatenate([[0], np.cumsum(read.sizes)]),
        np.concatenate(read.rewards),
        np.concatenate(read.sums, axis=1),
        cut_off,
        samples,
        int(read_about(path).get("max_tokens") or pc.max(pc.list_value_length(samples["response_ids"])).as_py()),
        left_out,
        longest,
        ends,
    )


@dataclass(frozen=True)
class _Needed:
    """What a training reads of its samples, and of which."""

    settings: PolicyGradientConfig
    for_critic: bool

    @property
    def values(self) -> bool:
        """A critic's values."""
        return self.settings.reads_values and not self.for_critic

    @property
    def reference(self) -> bool:
        """Scores under the reference."""
        return self.settings.kl_in_reward > 0 if self.for_critic else self.settings.reads_reference

    @property
    def alone(self) -> bool:
        """Samples are measured by something else than the other samples of their prompt."""
        return self.values or self.for_critic

    @property
    def equal(self) -> bool:
        """Prompts whose samples all have the same reward teach something: what the step's others are worth, or to stay near the
        reference.
        """
        settings = self.settings
        return self.alone or settings.facts.advantage == "batch" or settings.kl_coef > 0


@dataclass
class _Read:
    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    cut_off: list[np.ndarray] = field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        """Take the numbers of some whole groups."""
        ids = table["prompt_id"].to_pylist()
        starts = starts_of(ids)
        self.ids += [ids[start] for start in starts[:-1]]
        self.sizes += np.diff(starts).tolist()
        self.rewards.append(table["reward"].to_numpy())
        both = [table[name].to_numpy(zero_copy_only=False) for name in ("logp", "ref_logp")]
        self.sums.append(np.stack(both).astype(np.float64))
        self.cut_off.append(pc.equal(table["finish_reason"], "length").to_numpy(zero_copy_only=False).astype(bool))


def _kept(path: Path, table: pa.Table, needed: _Needed, seen: set[str], left_out: dict[str, int]) -> pa.Table:
    """The samples of whole groups that teach something; the others are counted."""
    ids, rewards = table["prompt_id"].to_pylist(), table["reward"].to_numpy(zero_copy_only=False).astype(np.float64)
    must_fit(path, table, "prompt_id", "logps", "logp", _AGAIN)
    if needed.reference:
        must_fit(path, table, "prompt_id", "ref_logps", "ref_logp", _AGAIN)
    if needed.values:
        must_fit(path, table, "prompt_id", "values", None, _AGAIN)
    stays = np.zeros(len(table), dtype=bool)
    starts = starts_of(ids)
    for start, end in pairwise(starts.tolist()):
        if ids[start] in seen:
            raise DataError(f"{path}: samples of prompt {ids[start]} do not stand together: {_AGAIN}")
        seen.add(ids[start])
        rewarded = np.isfinite(rewards[start:end])
        left_out["without a reward"] += int((~rewarded).sum())
        number = int(rewarded.sum())
        if number < (1 if needed.alone else 2):
            left_out["alone with a reward"] += number
        elif not needed.equal and np.ptp(rewards[start:end][rewarded]) == 0:
            left_out["of equal rewards"] += number
        else:
            stays[start:end] = rewarded
    return table.filter(pa.array(stays)).combine_chunks()
