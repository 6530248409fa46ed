"""Pairs, or responses, and their scores, brought together row group by row group: what pairs.parquet or responses.parquet holds."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import DROPPED
from pipeline.artifacts.tables import parquet_writer
from pipeline.engines.quarantine import pairs_left_out
from pipeline.errors import CheckError
from pipeline.hardware import return_freed_memory
from pipeline.pairs.groups import MISMATCHED
from pipeline.precompute.plan import Plan
from pipeline.store.lookup import Lookup


def write_joined(
    path: Path,
    plan: Plan,
    about: dict[str, Any],
    *,
    scored: bool = True,
    left_out: Collection[int] = (),
    lookup: Lookup | None = None,
) -> None:
    """Write pairs.parquet, or responses.parquet, durably, with what it says of itself; see `joined`."""
    with durable.replacing(path) as temporary, parquet_writer(temporary, plan.pairs.schema, about) as writer:
        for table in joined(plan, scored=scored, left_out=left_out, lookup=lookup):
            writer.write_table(table)


def rows_left_out(plan: Plan, quarantined: Mapping[bytes, str]) -> dict[int, str]:
    """Rows that cannot be used because a sequence's scores are not finite, and which: pairs with such a side; single responses
    with all that stands beside them; of a list what has no score, or all of it if fewer than two are left.
    """
    if plan.pairs.of_pairs or not quarantined:
        return pairs_left_out(plan.keys, quarantined)
    hits = pc.is_in(plan.keys, value_set=pa.array(list(quarantined), pa.binary(32))).to_numpy(zero_copy_only=False)
    group_of, left_out = plan.pairs.group_of, dict[int, str]()
    bad = np.flatnonzero(hits)
    for group in np.unique(group_of[bad]).tolist():
        rows = range(*np.searchsorted(group_of, [group, group + 1]).tolist())
        why = {row: quarantined[plan.keys[row].as_py()] for row in rows if hits[row]}
        first = next(iter(why))
        of_others = f"{'response' if first == rows[0] else 'the response beside it'}: {why[first]}"
        if plan.data == "lists" and len(rows) - len(why) > 1:
            left_out |= {row: f"response {row - rows[0] + 1}, from the best: {what}" for row, what in why.items()}
        else:
            left_out |= {row: f"response: {why[row]}" if row in why else of_others for row in rows}
    return left_out


def dropped_with(plan: Plan, left_out: Mapping[int, str]) -> pa.Table:
    """dropped.parquet's content: what planning dropped, and the rows that scoring left out, with their ids."""
    rows = []
    for number, detail in sorted(left_out.items()):
        found = plan.row(number)
        # what stood beside a response is of no row of its own
        if found.get("kind") != MISMATCHED:
            rows.append({**{name: found.get(name) for name in DROPPED.names}, "reason": "not_finite", "detail": detail})
    return pa.concat_tables([plan.pairs.dropped_table(), pa.Table.from_pylist(rows, schema=DROPPED)])


def joined(
    plan: Plan, *, scored: bool = True, left_out: Collection[int] = (), lookup: Lookup | None = None
) -> Iterator[pa.Table]:
    """Every row but those numbered `left_out` with its scores from the store, in order; not `scored`: with nulls in their place.

    `lookup`: where the plan's keys stand, if that was asked before. Values per token are null if only their sum was imported.
    Raises CheckError if a score is not there or has not the tokens' number of values.
    """
    scores = _Scores(plan, left_out, lookup or plan.store.lookup(plan.keys)) if scored else None
    absent = np.fromiter(left_out, dtype=np.int64, count=len(left_out))
    schema = plan.pairs.schema
    for first, rows in plan.pairs.groups():
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        if scores:
            columns |= scores.columns(first, first + len(rows))
        else:
            columns |= {
                name: pa.nulls(len(rows), schema.field(name).type) for name in schema.names if name not in columns
            }
        table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
        here = absent[(absent >= first) & (absent < first + len(table))] - first
        yield table.take(pa.array(np.setdiff1d(np.arange(len(table)), here))) if len(here) else table


class _Scores:
    """The scores of a plan's rows. Those of one shard lie among the rows in any order: in one pass over the shards they are written
    to a working file, from which they are read in order. Memory holds a few numbers per row, and a part of the file at a time.
    """

    def __init__(self, plan: Plan, left_out: Collection[int], lookup: Lookup) -> None:
        self._plan, self._left_out, self._sides = plan, left_out, len(plan.sides)
        self._offsets = np.concatenate([[0], np.cumsum(plan.pairs.response_tokens, dtype=np.int64)])
        self._sums = np.full(len(plan.keys), np.nan)
        self._by_sum = np.zeros(len(plan.keys), dtype=bool)
        self._file = _working_file(4 * max(int(self._offsets[-1]), 1))
        self._values = np.frombuffer(self._file, dtype=np.float32)
        for positions, table in lookup.rows(np.arange(len(plan.keys))):
            self._take(positions, table)
            self._let_go()
        absent = np.flatnonzero(np.isnan(self._sums))
        self._must_be_there(absent[~np.isin(absent // self._sides, list(left_out))])
        for position in absent.tolist():
            self._values[self._offsets[position] : self._offsets[position + 1]] = np.nan
        # what the shards' reader has left behind would stand beside the writer of pairs.parquet
        return_freed_memory()

    def columns(self, first: int, end: int) -> dict[str, pa.Array]:
        """The score columns of rows `first` to `end`, a row group."""
        first, end = first * self._sides, end * self._sides
        offsets, by_sum = self._offsets[first : end + 1], self._by_sum[first:end]
        logps = pa.ListArray.from_arrays(
            pa.array((offsets - offsets[0]).astype(np.int32)),
            pa.array(self._values[offsets[0] : offsets[-1]]),
            type=self._plan.pairs.schema.field(f"ref_{self._plan.sides[0]}_token_logps").type,
            mask=pa.array(by_sum) if by_sum.any() else None,
        )
        columns: dict[str, pa.Array] = {}
        for side, name in enumerate(self._plan.sides):
            places = pa.array(np.arange(side, end - first, self._sides))
            columns |= {
                f"ref_{name}_token_logps": logps.take(places),
                f"ref_{name}_logps": pa.array(self._sums[first:end]).take(places),
            }
        self._let_go()
        return columns

    def _take(self, positions: np.ndarray, table: pa.Table) -> None:
        scores = table["logps"].combine_chunks()
        given, wanted = np.diff(scores.offsets), self._plan.pairs.response_tokens[positions]
        if self._plan.imported:
            self._by_sum[positions] = given == 0
        self._must_cover(positions, np.where(self._by_sum[positions], 0, wanted), given)
        logps = scores.flatten()
        self._values[np.repeat(self._offsets[positions] - scores.offsets[:-1], given) + np.arange(len(logps))] = logps
        self._sums[positions] = table["logp"]

    def _let_go(self) -> None:
        """Have the system keep what was touched of the file, and count it no more as this process's memory."""
        self._file.madvise(mmap.MADV_DONTNEED)

    def _must_cover(self, positions: np.ndarray, lengths: np.ndarray, scored: np.ndarray) -> None:
        if not np.array_equal(lengths, scored):
            place = int(np.argmax(lengths != scored))
            number, side = divmod(int(positions[place]), self._sides)
            name = f"{self._plan.sides[side]} of {self._plan.name(number)}"
            raise CheckError(f"{name} has {lengths[place]} tokens but {scored[place]} scores")

    def _must_be_there(self, absent: np.ndarray) -> None:
        if len(absent):
            names = [self._plan.name(int(position) // self._sides).split() for position in absent[:10]]
            where = f"{names[0][0]}s {', '.join(name for _, name in names)}"
            raise CheckError(
                f"{len(absent)} scores are missing from the store after scoring, first of the {where}: a shard was set aside "
                "or removed meanwhile. Run 'refscore precompute' again, which scores what is missing"
            )


def _working_file(size: int) -> mmap.mmap:
    """So many bytes of a file without a name, mapped. Raises RefscoreError if there is no space for it."""
    place = durable.scratch_place()
    with durable.explaining_disk(Path(place or tempfile.gettempdir()), size), tempfile.TemporaryFile(dir=place) as file:
        # a page of a mapped file that finds no space on the disk would kill the process
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)
