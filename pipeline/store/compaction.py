"""Keeping a store tidy: leftovers of killed writers, references nobody uses, many small shards.

Compaction publishes the merged shard before it removes the small ones, so there is no moment in which a key cannot be
found; a reader that had listed the small ones lists again. Which row a key has is decided by `pipeline.store.lookup` alone, over
the whole directory: a merge never changes the row that a reader gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import about_in
from pipeline.errors import DataError
from pipeline.store.identity import ReferenceIdentity
from pipeline.store.lookup import Lookup
from pipeline.store.places import LocalPlace, set_aside_if_damaged
from pipeline.store.registrations import DAY, registered
from pipeline.store.shard import Unsound, open_shard, published_at, shard_files, sums_only
from pipeline.store.store import Store, read_reference

SMALL_BYTES = 32 * 2**20
MERGED_BYTES = 256 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Tidying:
    """What could be tidied in one store."""

    leftovers: list[Path]
    unreferenced: list[Path]
    small: dict[Path, list[list[Path]]]


def look(store: Path, used: set[str]) -> Tidying:
    """Find leftovers older than a day, references that nobody uses, and groups of small shards to merge.

    A reference is used if `used` names it, if a run that is registered in it may need it, or if a file in it is younger than
    a day. Links to references elsewhere are left alone.
    """
    references = [path.parent for path in sorted(store.glob("*/reference.json")) if not path.parent.is_symlink()]
    leftovers = [path for path in store.glob(f"*/{durable.TEMPORARY}*") if _age([path]) > DAY]
    return Tidying(
        leftovers=sorted(leftovers),
        unreferenced=[directory for directory in references if directory.name not in used and not _in_use(directory)],
        small={directory: groups for directory in references if (groups := _groups(directory))},
    )


def compact(directory: Path, group: list[Path]) -> int:
    """Merge the shards of `group` into one; returns its rows. Damaged shards are set aside, not merged."""
    sound = [shard for shard in group if _is_sound(shard)]
    durable.reached("compact: checked")
    if len(sound) < 2:
        return 0
    store = Store([str(directory.parent)], _identity(directory))
    contents = [content for shard in sound if (content := _content(shard))]
    if len(contents) < len(sound):
        return 0  # another compaction works here: what it leaves is merged the next time
    lookup = Lookup([LocalPlace(directory)], pa.concat_arrays([content.keys for content in contents]))
    # rows that stand in an earlier shard outside the group too are that shard's
    ours = lookup.held_by(sound)
    tables = [SCORES.empty_table(), *(table for _, table in lookup.rows(ours))]
    # sorted by key: the same rows give the same bytes, whoever merges them
    merged = pa.concat_tables(tables).sort_by("key").combine_chunks()
    if len(merged) < len(ours):
        return 0  # a shard turned out damaged while it was read
    name = ""
    if len(merged):
        circumstances = {
            repr(circumstance): circumstance for content in contents for circumstance in content.circumstances
        }
        published = min(content.published for content in contents)
        name = store.publish_table(merged, [circumstances[key] for key in sorted(circumstances)], published)
    durable.reached("compact: published")
    for shard in sound:
        if shard.name != name:
            shard.unlink(missing_ok=True)
            durable.reached("compact: one removed")
    durable.flush(directory)
    durable.reached("compact: done")
    return len(merged)


@dataclass(frozen=True)
class _Content:
    keys: pa.FixedSizeBinaryArray
    published: int
    circumstances: list[dict[str, str]]


def _content(shard: Path) -> _Content | None:
    try:
        with open_shard(shard) as file:
            keys = file.read(columns=["key"])["key"].combine_chunks()
            circumstances = about_in(file.schema_arrow).get("circumstances", [])
            return _Content(keys, published_at(file), circumstances)
    except (Unsound, FileNotFoundError):
        return None


def _is_sound(shard: Path) -> bool:
    try:
        return set_aside_if_damaged(shard) is None
    except FileNotFoundError:
        return False


def _in_use(reference: Path) -> bool:
    if any(registration.in_use() for registration in registered(reference)):
        return True
    return _age([reference, *reference.iterdir()]) < DAY


def _age(paths: Iterable[Path]) -> float:
    """Seconds since the youngest of `paths` changed; what has vanished meanwhile changed just now."""
    times = [status.st_mtime if (status := _if_there(path.stat)) else time.time() for path in paths]
    return time.time() - max(times)


def _groups(directory: Path) -> list[list[Path]]:
    """Small shards to merge; those that hold sums only are merged with one another alone."""
    small: dict[bool, list[tuple[Path, int]]] = {False: [], True: []}
    for shard in shard_files(directory):
        status = _if_there(shard.stat)
        if status is not None and status.st_size < SMALL_BYTES:
            small[_holds_sums(shard)].append((shard, status.st_size))
    return [group for alike in small.values() for group in _filled(alike) if len(group) > 1]


def _filled(shards: list[tuple[Path, int]]) -> list[list[Path]]:
    groups: list[list[Path]] = []
    filled = 0
    for shard, size in shards:
        if not groups or filled + size > MERGED_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += size
    return groups


def _holds_sums(shard: Path) -> bool:
    try:
        with open_shard(shard) as file:
            return sums_only(file)
    except (Unsound, FileNotFoundError):
        return False  # set aside, or passed over, if it is merged


def _if_there(ask: Callable[[], T]) -> T | None:
    """What `ask` says of a file; None if somebody has removed it."""
    try:
        return ask()
    except FileNotFoundError:
        return None


def _identity(directory: Path) -> ReferenceIdentity:
    identity = ReferenceIdentity.from_described(read_reference(directory))
    if identity.reference_id != directory.name:
        raise DataError(f"{directory}/reference.json does not describe this directory: it is left as it is")
    return identity
