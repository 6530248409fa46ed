"""Many small shards become few large ones. Any number of processes may do it at once, in one store.

A merged shard is published before the small ones are removed, so there is no moment in which a key cannot be found; a reader
that had listed the small ones lists again. Which row a key has is decided by `pipeline.store.lookup` alone, over everything that
the place holds: a merge never changes the row that a reader gets. Rows keep the order in which they arrived, so that those of
one data set stay together. Shards are merged with those alone that say the same of themselves (sums only, who computed them).
Memory holds the keys of one merged shard, and one row group.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import about_in
from pipeline.errors import DataError, RefscoreError
from pipeline.store.identity import ReferenceIdentity
from pipeline.store.lookup import Lookup
from pipeline.store.places import Entry, Place
from pipeline.store.shard import ShardFacts, Unsound, check_shard, facts_of, open_shard, published_at, shard_problem
from pipeline.store.store import Store, open_place, read_reference
from pipeline.store.tidying.claims import claimed, claiming, sweep
from pipeline.store.tidying.inventory import REQUESTS, shard_entries

SMALL_BYTES = 32 * 2**20
# of a merged shard at most; its keys are held in memory, and what each of the small ones says of itself
MERGED_BYTES, MERGED_ROWS, MERGED_SHARDS = 256 * 2**20, 2**20, 4096
# what shards that are merged need not say alike
_OF_EACH = ("published", "circumstances")


def identified(store: str, reference_id: str) -> Store:
    """One reference of a store, by its own description. Raises DataError if that is another's, or cannot be read."""
    place = open_place(store, reference_id, first=True)
    identity = ReferenceIdentity.from_described(read_reference(place))
    if identity.reference_id != reference_id:
        raise DataError(f"{place.name}/reference.json does not describe this directory: it is left as it is")
    return Store([store], identity)


def compact_small(store: Store, entries: Iterable[Entry]) -> Iterator[tuple[int, int | None]]:
    """Merge the small shards among the entries of the store's first place, group by group: of each its shards, and the rows of
    the merged one, None if another process works at it. Raises RefscoreError if the place refuses.
    """
    place, entries = store.places[0], list(entries)
    groups = groups_of(place, entries)
    if groups:
        _must_be_removable(place)
        sweep(place, entries)
    for group in groups:
        with claiming(place, group) as ours:
            rows = compact(store, group) if ours else None
        yield len(group), rows
    store.finish()


def groups_of(place: Place, entries: Iterable[Entry]) -> list[list[str]]:
    """Small shards that could be one, in the order in which they were published, without those that other processes claim."""
    entries = list(entries)
    taken = claimed(place, entries)
    small = [entry for entry in shard_entries(entries) if entry.bytes < SMALL_BYTES and entry.name not in taken]
    if len(small) < 2:
        return []
    # no shard is opened of which an index speaks: what it says is compared with them when they are merged
    known = place.indexes.facts_of(place.listed().indexes)
    with ThreadPoolExecutor(REQUESTS) as pool:
        opened = pool.map(partial(_looked_at, place), [entry for entry in small if entry.name not in known])
        there = [one for one in opened if one]
    there += [_Small(entry.bytes, known[entry.name]) for entry in small if entry.name in known]
    alike: dict[tuple[bool, str], list[_Small]] = {}
    for one in sorted(there, key=lambda one: (one.facts.published, one.facts.name)):
        alike.setdefault((one.facts.sums_only, one.facts.computed_by), []).append(one)
    return [group for shards in alike.values() for group in _filled(shards) if len(group) > 1]


def compact(store: Store, names: Sequence[str]) -> int | None:
    """Merge these shards of the store's first place into one; returns its rows. Damaged ones are set aside, not merged.

    None if fewer than two are there, sound, and say the same of themselves, or if another process works at them.
    """
    place = store.places[0]
    with tempfile.TemporaryDirectory(dir=durable.scratch_place()) as folder:
        shards = _alike(_sound(place, names, Path(folder)))
        durable.reached("compact: checked")
        if len(shards) < 2:
            return None
        try:
            rows, name = _publish(store, shards)
        except Unsound:
            return None  # another process works here, or reads differ: what is left is merged the next time
    durable.reached("compact: published")
    for shard in shards:
        if shard.path.name != name:
            place.remove(shard.path.name)
            durable.reached("compact: one removed")
    durable.reached("compact: done")
    return rows


@dataclass(frozen=True)
class _Shard:
    """A shard that was found sound: a local file of its bytes, when it was published, what else it says, and its keys."""

    path: Path
    size: int
    published: int
    about: dict[str, Any]
    keys: pa.FixedSizeBinaryArray


def _sound(place: Place, names: Sequence[str], folder: Path) -> list[_Shard]:
    """Those of the shards that are sound, in the order in which they were published; damaged ones are set aside."""
    shards = []
    for name in names:
        try:
            path = place.local(name, folder)
            if check_shard(path) is not None:
                place.set_aside(name)
                continue
            with open_shard(path) as file:
                keys = file.read(columns=["key"])["key"].combine_chunks()
                about = about_in(file.schema_arrow)
                shards.append(_Shard(path, path.stat().st_size, published_at(file), about, keys))
        except (FileNotFoundError, Unsound):
            continue  # another process was here
    return sorted(shards, key=lambda shard: (shard.published, shard.path.name))


def _alike(shards: list[_Shard]) -> list[_Shard]:
    """Most of the shards: those that say the same of themselves."""
    alike: dict[str, list[_Shard]] = {}
    for shard in shards:
        said = sorted((word, what) for word, what in shard.about.items() if word not in _OF_EACH)
        alike.setdefault(json.dumps(said), []).append(shard)
    return max(alike.values(), key=len, default=[])


def _publish(store: Store, shards: list[_Shard]) -> tuple[int, str]:
    """Publish those rows that a reader gets from these shards and from no other; how many they are, and the new shard's name."""
    keys = pa.concat_arrays([shard.keys for shard in shards])
    kept = np.zeros(len(keys), dtype=bool)
    kept[_ours(store.places[0], keys, {shard.path.name for shard in shards})] = True
    if not kept.any():
        return 0, ""
    circumstances = {repr(one): one for shard in shards for one in shard.about.get("circumstances", [])}
    about = {
        **shards[0].about,
        "published": shards[0].published,
        "circumstances": [circumstances[key] for key in sorted(circumstances)],
    }
    parts = partial(_parts, shards, kept)
    return int(kept.sum()), store.publish_parts(parts, about, sum(shard.size for shard in shards))


def _ours(place: Place, keys: pa.FixedSizeBinaryArray, names: Collection[str]) -> np.ndarray:
    """Positions of the rows of the shards `names`, whose keys these are, that a reader gets from these and from no other.

    Of a key that stands in two of them the first is got; of one that was published earlier elsewhere, none. That it stands
    elsewhere is seen there: a wrong index must not make it be removed here. Raises Unsound if one of the shards is gone.
    """
    lookup, seen = Lookup([place], keys), np.empty(0, dtype=np.int64)
    while True:
        ours = lookup.held_by(map(Path, names))
        elsewhere = np.setdiff1d(lookup.held, ours)
        if np.isin(elsewhere, seen).all():
            break
        for _ in lookup.rows(elsewhere):
            pass
        seen = elsewhere
    if len(lookup.missing) and not set(names) <= set(place.listed().shards):
        raise Unsound("a shard is gone that was to be merged")
    # an index may hide what is here all the same
    return np.concatenate([ours, lookup.missing])


def _parts(shards: list[_Shard], kept: np.ndarray) -> Iterator[pa.Table]:
    """The kept rows, in order. Raises Unsound if they cannot be read as they were."""
    at = 0
    for shard in shards:
        try:
            with open_shard(shard.path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group)
                    if problem := shard_problem(file, table):
                        raise Unsound(problem)
                    yield table.filter(pa.array(kept[at : at + len(table)])).cast(SCORES)
                    at += len(table)
        except FileNotFoundError:
            raise Unsound("it is gone") from None


@dataclass(frozen=True)
class _Small:
    """A small shard, and what it says of itself."""

    bytes: int
    facts: ShardFacts


def _looked_at(place: Place, entry: Entry) -> _Small | None:
    """None if it is gone."""
    try:
        with place.open(entry.name) as content, open_shard(Path(entry.name), content) as file:
            return _Small(entry.bytes, facts_of(entry.name, file))
    except FileNotFoundError:
        return None
    except Unsound:
        return _Small(entry.bytes, ShardFacts(entry.name, 0, 0, False, ""))  # set aside if it is merged


def _filled(shards: list[_Small]) -> list[list[str]]:
    groups: list[list[str]] = []
    size = rows = 0
    for shard in shards:
        full = not groups or len(groups[-1]) == MERGED_SHARDS
        if full or size + shard.bytes > MERGED_BYTES or rows + shard.facts.rows > MERGED_ROWS:
            groups.append([])
            size = rows = 0
        groups[-1].append(shard.facts.name)
        size, rows = size + shard.bytes, rows + shard.facts.rows
    return groups


def _must_be_removable(place: Place) -> None:
    """Without the right to remove, shards would be merged again and again."""
    probe = f"{durable.TEMPORARY}probe"
    place.write(probe, b"")
    try:
        place.remove(probe)
    except RefscoreError as error:
        raise RefscoreError(f"shards are not merged where the small ones cannot be removed: {error}") from None
