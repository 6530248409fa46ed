"""Keeping a store tidy: leftovers of killed writers, references nobody uses, many small shards.

Compaction publishes the merged shard before it removes the small ones, so there is no moment in which a key cannot be
found; a reader that had listed the small ones lists again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline import durable
from pipeline.errors import DataError
from pipeline.identity import ReferenceIdentity
from pipeline.schema import SCORES
from pipeline.shelf import set_aside, shard_files
from pipeline.store import Store, check_shard, read_reference

SMALL_BYTES = 32 * 2**20
MERGED_BYTES = 256 * 2**20
_DAY = 24 * 3600


@dataclass(frozen=True)
class Tidying:
    """What could be tidied in one store."""

    leftovers: list[Path]
    unreferenced: list[Path]
    small: dict[Path, list[list[Path]]]


def look(store: Path, used: set[str]) -> Tidying:
    """Find leftovers older than a day, references that none of `used` names, and groups of small shards to merge."""
    references = sorted(path.parent for path in store.glob("*/reference.json"))
    now = time.time()
    leftovers = [path for path in store.glob(f"*/{durable.TEMPORARY}*") if now - path.stat().st_mtime > _DAY]
    return Tidying(
        leftovers=sorted(leftovers),
        unreferenced=[directory for directory in references if directory.name not in used],
        small={directory: groups for directory in references if (groups := _groups(directory))},
    )


def compact(directory: Path, group: list[Path]) -> int:
    """Merge the shards of `group` into one; returns its rows. Damaged shards are set aside, not merged."""
    sound = []
    for shard in group:
        problem = check_shard(shard)
        if problem:
            set_aside(shard, problem)
        else:
            sound.append(shard)
    durable.reached("compact: checked")
    if len(sound) < 2:
        return 0
    # sorted by key: the same rows give the same bytes, whoever merges them
    merged = pl.scan_parquet(sound).collect(engine="streaming").unique("key").sort("key")
    name = Store([str(directory.parent)], _identity(directory)).publish_table(_as_scores(merged))
    durable.reached("compact: published")
    for shard in sound:
        if shard.name != name:
            shard.unlink(missing_ok=True)
            durable.reached("compact: one removed")
    durable.flush(directory)
    durable.reached("compact: done")
    return len(merged)


def _groups(directory: Path) -> list[list[Path]]:
    groups: list[list[Path]] = []
    filled = 0
    for shard in shard_files(directory):
        size = shard.stat().st_size
        if size >= SMALL_BYTES:
            continue
        if not groups or filled + size > MERGED_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += size
    return [group for group in groups if len(group) > 1]


def _as_scores(frame: pl.DataFrame) -> pa.Table:
    table = frame.to_arrow()
    key = table["key"].combine_chunks().cast(pa.binary()).cast(pa.binary(32))
    return pa.table([key, *(table[name].cast(SCORES.field(name).type) for name in SCORES.names[1:])], schema=SCORES)


def _identity(directory: Path) -> ReferenceIdentity:
    identity = ReferenceIdentity.from_described(read_reference(directory))
    if identity.reference_id != directory.name:
        raise DataError(f"{directory}/reference.json does not describe this directory: it is left as it is")
    return identity
