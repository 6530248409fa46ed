"""Pairs and their scores, brought together row group by row group: what pairs.parquet holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline import durable
from pipeline.errors import CheckError
from pipeline.pair_table import GROUP
from pipeline.precompute import Plan
from pipeline.schema import PAIRS, parquet_writer

# row groups that are looked up in the store together: each look-up reads the keys of every shard
_TOGETHER = 8


def write_joined(path: Path, plan: Plan, about: dict[str, Any], *, scored: bool = True) -> None:
    """Write pairs.parquet durably, with what it says of itself; see `joined`."""
    with durable.replacing(path) as temporary, parquet_writer(temporary, PAIRS, about) as writer:
        for table in joined(plan, scored=scored):
            writer.write_table(table)


def joined(plan: Plan, *, scored: bool = True) -> Iterator[pa.Table]:
    """Every pair with its scores from the store, in order; not `scored`: with nulls in their place.

    Raises CheckError where a score is not there or has not the tokens' number of values.
    """
    for first, pairs in _groups(plan):
        columns = dict(zip(pairs.schema.names, pairs.columns, strict=True))
        if scored:
            columns |= _scores(plan, plan.keys[2 * first : 2 * (first + len(pairs))], pairs)
        else:
            columns |= {
                name: pa.nulls(len(pairs), PAIRS.field(name).type) for name in PAIRS.names if name not in columns
            }
        yield pa.table({name: columns[name] for name in PAIRS.names}, schema=PAIRS)


def _groups(plan: Plan) -> Iterator[tuple[int, pa.Table]]:
    held: list[pa.Table] = []
    start = 0
    for first, table in plan.pairs.groups():
        start = first if not held else start
        held.append(table)
        if len(held) == _TOGETHER or len(table) < GROUP:
            yield start, pa.concat_tables(held)
            held = []
    if held:
        yield start, pa.concat_tables(held)


def _scores(plan: Plan, keys: pa.FixedSizeBinaryArray, pairs: pa.Table) -> dict[str, pa.ChunkedArray]:
    scores = plan.store.found(keys).select("key", "logps", "logp")
    found = pl.DataFrame({"key": pl.Series(keys)}).join(scores, on="key", how="left", maintain_order="left")
    absent = found["logp"].is_null().arg_true().to_list()
    if absent:
        ids = ", ".join(pairs["pair_id"][position // 2].as_py() for position in absent[:10])
        raise CheckError(f"{len(absent)} scores are missing from the store after scoring, first of the pairs {ids}")
    # Polars' lists have 64-bit offsets, PAIRS' columns 32-bit ones
    kinds = pa.schema([("logps", PAIRS.field("ref_chosen_logps").type), ("logp", pa.float64())])
    columns: dict[str, pa.ChunkedArray] = {}
    for side, name in enumerate(("chosen", "rejected")):
        table = found.select("logps", "logp")[side::2].to_arrow().cast(kinds)
        _must_cover(name, pairs, table)
        columns |= {f"ref_{name}_logps": table["logps"], f"ref_{name}_logp": table["logp"]}
    return columns


def _must_cover(side: str, pairs: pa.Table, scores: pa.Table) -> None:
    wanted, lengths = (pl.Series(column).list.len().to_numpy() for column in (pairs[f"{side}_ids"], scores["logps"]))
    if not np.array_equal(wanted, lengths):
        row = int(np.argmax(wanted != lengths))
        raise CheckError(f"{side} of pair {pairs['pair_id'][row]} has {wanted[row]} tokens but {lengths[row]} scores")
