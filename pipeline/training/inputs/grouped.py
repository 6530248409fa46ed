"""Tables of single responses of which some belong together, one row after the other: cut between groups, checked, as trees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.forward.trees import Tree
from pipeline.training.inputs.pairs import Stored


def starts_of(ids: Sequence[str]) -> np.ndarray:
    """Where runs of equal ids begin, and the end."""
    changes = [number for number in range(len(ids)) if number == 0 or ids[number] != ids[number - 1]]
    return np.array([*changes, len(ids)], dtype=np.int64)


def in_whole_groups(parts: Iterable[pa.Table], column: str) -> Iterator[pa.Table]:
    """The same rows, cut between groups alone, which are rows of one value of `column`."""
    rest: pa.Table | None = None
    for part in parts:
        table = part if rest is None else pa.concat_tables([rest, part])
        starts = starts_of(table[column].to_pylist())
        # the last group may go on
        last = int(starts[-2]) if len(starts) > 1 else 0
        if last:
            yield table.slice(0, last).combine_chunks()
        rest = table.slice(last)
    if rest is not None and len(rest):
        yield rest.combine_chunks()


def must_fit(
    path: Path, table: pa.Table, names: str, column: str, total: str | None, way_out: str, rounding: float = 0
) -> None:
    """Raise DataError unless every response has as many finite scores in `column` as tokens, and a sum in `total`, if there is one,
    that is theirs.

    `names`: the column that names a row; `way_out`: what to do; `rounding`: by how much a score may be off that its sum is of.
    """
    scores = table[column].combine_chunks()
    given = pc.fill_null(pc.list_value_length(scores), 0).to_numpy()
    values, ends = scores.flatten().to_numpy(), np.cumsum(given)
    broken = (given == 0) | (given != pc.list_value_length(table["response_ids"]).to_numpy())
    if not (finite := np.isfinite(values)).all():
        broken[np.searchsorted(ends, np.flatnonzero(~finite), side="right")] = True
    if total is not None and not broken.any():
        sums = table[total].to_numpy(zero_copy_only=False)
        found = np.add.reduceat(values, ends - given, dtype=np.float64)
        broken = ~(np.abs(found - sums) <= 1e-6 * (1 + np.abs(sums)) + rounding * given)
    if broken.any():
        name = table[names][int(np.argmax(broken))]
        raise DataError(f"{path}: a response of {names} {name} has no whole set of {column}: {way_out}")


def longest_of(table: pa.Table) -> int:
    """Tokens of the longest prompt with its response."""
    prompts, responses = (pc.list_value_length(table[name]).to_numpy() for name in ("prompt_ids", "response_ids"))
    return int((prompts + responses).max())


def ends_of(table: pa.Table) -> set[int]:
    """Tokens that responses end with."""
    column = table["response_ids"].combine_chunks()
    return set(np.unique(column.values.to_numpy()[column.offsets.to_numpy()[1:] - 1]).tolist())


def tree_of(prompt: pa.ListScalar, response: pa.ListScalar) -> Tree:
    """One response as a tree of its own."""
    ids, branch = (row.values.to_numpy().tolist() for row in (prompt, response))
    return Tree(ids, (branch,))


class GroupedTrees(Sequence[Tree]):
    """Trees of a prompt with all responses of its group, made when they are asked for.

    `columns`: prompt and response ids of every response; those of group `row` are rows `starts[row]` to `starts[row + 1]`.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray], starts: np.ndarray) -> None:
        self._alone: Sequence[Tree] = Stored(columns, tree_of)
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, row: int) -> Tree: ...
    @overload
    def __getitem__(self, row: slice) -> list[Tree]: ...
    def __getitem__(self, row: int | slice) -> Tree | list[Tree]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        alone = [self._alone[number] for number in range(int(self._starts[row]), int(self._starts[row + 1]))]
        return Tree(alone[0].trunk, tuple(tree.branches[0] for tree in alone))
