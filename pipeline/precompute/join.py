"""Pairs and their scores, brought together row group by row group: what pairs.parquet holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import DROPPED, PAIRS
from pipeline.artifacts.tables import parquet_writer
from pipeline.errors import CheckError
from pipeline.hardware import return_freed_memory
from pipeline.pairs.table import GROUP
from pipeline.precompute.plan import Plan

# bytes of scores held at a time. They lie in no order in a compacted store, so each time all of it may be read
_AT_ONCE = 2**24
# a sequence takes four bytes per token, and about this where it is looked up
_PER_SEQUENCE = 64


def write_joined(
    path: Path, plan: Plan, about: dict[str, Any], *, scored: bool = True, left_out: Collection[int] = ()
) -> None:
    """Write pairs.parquet durably, with what it says of itself; see `joined`."""
    with durable.replacing(path) as temporary, parquet_writer(temporary, PAIRS, about) as writer:
        for table in joined(plan, scored=scored, left_out=left_out):
            writer.write_table(table)


def dropped_with(plan: Plan, left_out: Mapping[int, str]) -> pa.Table:
    """dropped.parquet's content: what planning dropped, and the pairs that scoring left out, with their ids."""
    rows = []
    for number, detail in sorted(left_out.items()):
        pair = plan.row(number)
        rows.append({**{name: pair.get(name) for name in DROPPED.names}, "reason": "not_finite", "detail": detail})
    return pa.concat_tables([plan.pairs.dropped_table(), pa.Table.from_pylist(rows, schema=DROPPED)])


def joined(plan: Plan, *, scored: bool = True, left_out: Collection[int] = ()) -> Iterator[pa.Table]:
    """Every pair but those numbered `left_out` with its scores from the store, in order; not `scored`: with nulls in their place.

    Values per token are null if only their sum was imported. Raises CheckError if a score is not there or has not the tokens'
    number of values.
    """
    scores = _Scores(plan, left_out) if scored else None
    absent = np.fromiter(left_out, dtype=np.int64, count=len(left_out))
    for first, pairs in plan.pairs.groups():
        columns = dict(zip(pairs.schema.names, pairs.columns, strict=True))
        if scores:
            columns |= scores.columns(first, first + len(pairs))
        else:
            columns |= {
                name: pa.nulls(len(pairs), PAIRS.field(name).type) for name in PAIRS.names if name not in columns
            }
        table = pa.table({name: columns[name] for name in PAIRS.names}, schema=PAIRS)
        here = absent[(absent >= first) & (absent < first + len(table))] - first
        yield table.take(pa.array(np.setdiff1d(np.arange(len(table)), here))) if len(here) else table


class _Scores:
    """The scores of a plan's pairs, read from the store for as many row groups at a time as `_AT_ONCE` allows."""

    def __init__(self, plan: Plan, left_out: Collection[int]) -> None:
        self._plan, self._left_out = plan, left_out
        self._lookup = plan.store.lookup(plan.keys)
        self._first = self._end = 0
        self._logps: pa.Array = None

    def columns(self, first: int, end: int) -> dict[str, pa.Array]:
        """PAIRS' score columns of pairs `first` to `end`, a row group."""
        if end > self._end:
            self._first, self._end = first, self._reach(first)
            self._load(np.arange(2 * first, 2 * self._end))
            # shard by shard read, and the writer of pairs.parquet stands beside it
            return_freed_memory()
        columns: dict[str, pa.Array] = {}
        for side, name in enumerate(("chosen", "rejected")):
            places = np.arange(2 * (first - self._first) + side, 2 * (end - self._first), 2)
            columns |= {
                f"ref_{name}_token_logps": self._logps.take(pa.array(places)),
                f"ref_{name}_logps": pa.array(self._sums[places]),
            }
        return columns

    def _reach(self, first: int) -> int:
        pairs = self._plan.pairs
        tokens = pairs.response_tokens[2 * first :].reshape(-1, 2).sum(axis=1, dtype=np.int64)
        fit = int(np.searchsorted(np.cumsum(4 * tokens + 2 * _PER_SEQUENCE), _AT_ONCE, side="right"))
        return len(pairs) if fit == len(tokens) else min(first + max(fit // GROUP, 1) * GROUP, len(pairs))

    def _load(self, positions: np.ndarray) -> None:
        lengths = self._plan.pairs.response_tokens[positions]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self._logps = None  # not two of them at a time
        values = np.full(offsets[-1], np.nan, dtype=np.float32)
        self._sums, by_sum = np.full(len(positions), np.nan), np.zeros(len(positions), dtype=bool)
        for positions_read, table in self._lookup.rows(positions):
            places = positions_read - positions[0]
            scores = table["logps"].combine_chunks()
            given = np.diff(scores.offsets)
            if self._plan.imported:
                by_sum[places] = given == 0
            self._must_cover(positions_read, np.where(by_sum[places], 0, lengths[places]), given)
            logps = scores.flatten()
            values[np.repeat(offsets[places] - scores.offsets[:-1], given) + np.arange(len(logps))] = logps
            self._sums[places] = table["logp"]
        absent = positions[np.isnan(self._sums)]
        self._must_be_there(absent[~np.isin(absent // 2, list(self._left_out))])
        kind = PAIRS.field("ref_chosen_token_logps").type
        self._logps = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(values), type=kind, mask=pa.array(by_sum) if by_sum.any() else None
        )

    def _must_cover(self, positions: np.ndarray, lengths: np.ndarray, scored: np.ndarray) -> None:
        if not np.array_equal(lengths, scored):
            place = int(np.argmax(lengths != scored))
            side = ("chosen", "rejected")[positions[place] % 2]
            pair_id = self._plan.row(positions[place] // 2)["pair_id"]
            raise CheckError(f"{side} of pair {pair_id} has {lengths[place]} tokens but {scored[place]} scores")

    def _must_be_there(self, absent: np.ndarray) -> None:
        if len(absent):
            ids = ", ".join(self._plan.row(position // 2)["pair_id"] for position in absent[:10])
            raise CheckError(
                f"{len(absent)} scores are missing from the store after scoring, first of the pairs {ids}: a shard was set aside "
                "or removed meanwhile. Run 'refscore precompute' again, which scores what is missing"
            )
