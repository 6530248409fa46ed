"""Labelled responses and ranked lists with the reference's scores, as a policy learns from them.

A group of the table is one example: a labelled response with the mismatched one beside it, if there is one, or a prompt's list.
What stays in memory is a few numbers per response; token ids are read from disk when they are asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import RESPONSES, ROUNDING
from pipeline.artifacts.tables import read_about, read_groups
from pipeline.errors import DataError
from pipeline.forward.trees import Tree
from pipeline.training.inputs.grouped import (
    GroupedTrees,
    ends_of,
    in_whole_groups,
    longest_of,
    must_fit,
    starts_of,
)

_AGAIN = "run 'refscore precompute' again"
_IDS = ("prompt_ids", "response_ids")
_KEPT = (*_IDS, "ref_response_token_logps")


@dataclass
class RunningMean:
    """The mean of all rewards that a training has seen, and how many they were: what BCO compares with, part of a checkpoint."""

    total: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        """0 if none was seen."""
        return self.total / self.count if self.count else 0.0

    def add(self, total: float, count: float) -> None:
        """Count some more in."""
        self.total, self.count = self.total + total, self.count + count


@dataclass(frozen=True)
class Responses:
    """Examples of one split, each of some of R responses; see `pipeline.training.inputs.batches.Examples`.

    Responses of example `row` are numbers `starts[row]` to `starts[row + 1]` of `good` (bool [R]; of lists false), `scores`
    (float64 [R]; of labelled ones NaN), `ref_sums` (float64 [R]) and of the rows of `table`. `mismatched`: for each example the
    response to another prompt; none unless a loss measures its baseline by them.
    """

    ids: Sequence[str]
    starts: np.ndarray
    good: np.ndarray
    scores: np.ndarray
    ref_sums: np.ndarray
    table: pa.Table
    longest: int
    ends: set[int]
    running: RunningMean
    mismatched: Responses | None = None
    _trees: Sequence[Tree] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        # made once: every step asks for it many times
        object.__setattr__(self, "_trees", GroupedTrees([self.table[name] for name in _IDS], self.starts))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trees(self) -> Sequence[Tree]:
        """The token ids of each prompt with its responses."""
        return self._trees

    def of(self, row: int) -> range:
        """Numbers of the responses of example `row`."""
        return range(int(self.starts[row]), int(self.starts[row + 1]))

    def stored_logps(self, row: int) -> list[np.ndarray]:
        """The reference's logps of every token of the example's responses, float32."""
        column = self.table["ref_response_token_logps"]
        return [column[number].values.to_numpy(zero_copy_only=False) for number in self.of(row)]


def load_responses(
    path: Path, split: str, *, scored: bool, mismatched: bool = False, running: RunningMean | None = None
) -> Responses:
    """Read one split of responses.parquet; `scored` asks for the reference's scores, `mismatched` for a mismatched response each.

    `running`: the mean of rewards that this split shares with another. Raises DataError if a response's scores do not fit its
    tokens, or if an example lacks what is asked for.
    """
    columns = [name for name in RESPONSES.names if name not in ("source", "source_row", "topic", "prompt", "response")]
    own, others = _Read(), _Read()
    rounding = float(read_about(path).get(ROUNDING, 0))
    with tempfile.TemporaryDirectory(prefix="responses-", dir=durable.scratch_place()) as directory:
        place = Path(directory)
        schema = pa.schema([RESPONSES.field(name) for name in _KEPT])
        with (
            durable.explaining_disk(place),
            pa.ipc.new_file(place / "own", schema) as writer,
            pa.ipc.new_file(place / "mismatched", schema) as other_writer,
        ):
            for whole in in_whole_groups(read_groups(path, RESPONSES, columns), "group_id"):
                table = whole.filter(pc.equal(whole["split"], split)).combine_chunks()
                if not len(table):
                    continue
                if scored:
                    total = "ref_response_logps"
                    must_fit(path, table, "group_id", "ref_response_token_logps", total, _AGAIN, rounding)
                is_other = pc.equal(table["kind"], "mismatched")
                writer.write_table(own.add(table.filter(pc.invert(is_other)).combine_chunks()))
                if mismatched:
                    other_writer.write_table(others.add(table.filter(is_other).combine_chunks()))
        # mapped, the files need no name
        tables = [pa.ipc.open_file(pa.memory_map(str(place / name))).read_all() for name in ("own", "mismatched")]
    if mismatched and others.ids != own.ids:
        lacking = next(iter(set(own.ids) - set(others.ids)), "")
        raise DataError(
            f"{path}: {lacking or 'an example'} has no mismatched response, by which kto's baseline is measured: {_AGAIN}"
        )
    running = running or RunningMean()
    beside = others.made(tables[1], running) if mismatched else None
    return own.made(tables[0], running, beside)


@dataclass
class _Read:
    """What is known of the responses that were read."""

    ids: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    longest: int = 0
    ends: set[int] = field(default_factory=set)

    def add(self, table: pa.Table) -> pa.Table:
        """Take the numbers of some whole groups; returns their tokens."""
        ids = table["group_id"].to_pylist()
        starts = starts_of(ids)
        self.ids += [ids[start] for start in starts[:-1]]
        self.sizes += np.diff(starts).tolist()
        numbers = [pc.fill_null(table["label"], False), table["score"], table["ref_response_logps"]]
        self.columns.append(np.stack([column.to_numpy(zero_copy_only=False).astype(np.float64) for column in numbers]))
        if len(table):
            self.longest, self.ends = max(self.longest, longest_of(table)), self.ends | ends_of(table)
        return table.select(_KEPT).cast(pa.schema([RESPONSES.field(name) for name in _KEPT]))

    def made(self, table: pa.Table, running: RunningMean, mismatched: Responses | None = None) -> Responses:
        """All that was read, as examples."""
        good, scores, ref_sums = np.concatenate([np.zeros((3, 0)), *self.columns], axis=1)
        starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        return Responses(
            self.ids, starts, good.astype(bool), scores, ref_sums, table, self.longest, self.ends, running, mismatched
        )
