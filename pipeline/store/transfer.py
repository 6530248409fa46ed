"""Scores from one store into another: whole shards as they are, or the rows that a data set needs.

A copy keeps when its rows were published and under which circumstances, so that of two copies of a key the same one counts in
every store. What arrives is checked like everything that is published; nothing at the source is changed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.tables import about_in
from pipeline.errors import ConfigError, DataError, RefscoreError, first_line
from pipeline.progress import SILENT, Listener
from pipeline.store.identity import ReferenceIdentity
from pipeline.store.places import Place, is_url
from pipeline.store.shard import Unsound, open_shard, published_at
from pipeline.store.store import Store, open_place

_REFERENCE = re.compile(r"[0-9a-f]{64}")


@dataclass
class Copied:
    """Of one reference: shards and rows that were copied, and rows (or shards, if these are copied whole) that were there."""

    reference_id: str
    shards: int = 0
    rows: int = 0
    there: int = 0


def described_references(store: str) -> dict[str, ReferenceIdentity]:
    """The references at a place, a directory or a URL, by id; those of another version are left out.

    Raises DataError if there is no such place, RefscoreError if it cannot be listed.
    """
    files, root = _opened(store)
    try:
        names = [_last(path) for path in files.ls(root, detail=False)]
        found = {}
        for name in filter(_REFERENCE.fullmatch, sorted(names)):
            try:
                described = json.loads(files.cat_file(f"{root}/{name}/reference.json"))
            except FileNotFoundError:
                continue
            identity = _identity(described)
            if identity and identity.reference_id == name:
                found[name] = identity
    except FileNotFoundError:
        raise DataError(f"store {store} does not exist: check its name") from None
    except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
        raise RefscoreError(
            f"store {store} cannot be listed ({first_line(error)}): check the name, the network and the credentials in the "
            "environment"
        ) from None
    return found


def copy_shards(
    source: str, target: str, identities: Collection[ReferenceIdentity], listener: Listener = SILENT
) -> list[Copied]:
    """Copy every shard of these references that `target` lacks. Raises RefscoreError if a place refuses."""
    copies = []
    for identity in identities:
        copied = Copied(identity.reference_id)
        origin = open_place(source, identity.reference_id, first=False)
        destination = open_place(target, identity.reference_id, first=True)
        held = _names(target, identity.reference_id)
        shards = origin.shards()
        with listener.progress(f"{identity.reference_id[:12]} shards", len(shards)) as ticker:
            for shard in shards:
                if shard.name in held:
                    copied.there += 1
                else:
                    copied.rows += _copy_shard(shard, destination, identity)
                    copied.shards += 1
                ticker.advance(1, f"{copied.rows:,} sequences")
        copies.append(copied)
    return copies


def copy_rows(keys: pa.FixedSizeBinaryArray, source: str, target: str, identity: ReferenceIdentity) -> Copied:
    """Copy the rows of `keys` that `source` has and `target` has not. Raises RefscoreError if a place refuses."""
    copied = Copied(identity.reference_id)
    destination = Store([target], identity)
    there = destination.lookup(keys)
    copied.there = len(there.held)
    wanted = keys.take(pa.array(there.missing))
    for shard in open_place(source, identity.reference_id, first=False).shards():
        table, circumstances, published = _read(shard)
        fresh = table.filter(pc.is_in(table["key"], value_set=wanted)).combine_chunks()
        if len(fresh):
            destination.publish_table(fresh, circumstances, published)
            copied.shards += 1
            copied.rows += len(fresh)
            # a key that stands in a later shard too is copied once
            wanted = wanted.filter(pc.invert(pc.is_in(wanted, value_set=fresh["key"].combine_chunks())))
    return copied


def _copy_shard(shard: Path, destination: Place, identity: ReferenceIdentity) -> int:
    with durable.explaining_disk(Path(destination.name), shard.stat().st_size):
        workspace = destination.workspace()
        temporary = durable.temporary_beside(workspace / shard.name)
        described = temporary.with_name(f"{temporary.name}.json")
        try:
            described.write_text(json.dumps(identity.described(), indent=2) + "\n", encoding="utf-8")
            destination.publish(described, "reference.json")
            shutil.copyfile(shard, temporary)
            durable.flush(temporary)
            destination.publish(temporary, shard.name)
        finally:
            temporary.unlink(missing_ok=True)
            described.unlink(missing_ok=True)
    return len(_read(shard)[0])


def _read(shard: Path) -> tuple[pa.Table, list[dict[str, str]], int]:
    """A shard's rows, their circumstances, and when they were published."""
    try:
        with open_shard(shard) as file:
            return file.read(), about_in(file.schema_arrow).get("circumstances", []), published_at(file)
    except (Unsound, FileNotFoundError) as problem:
        raise RefscoreError(
            f"{shard} cannot be copied ({problem}): run the same command again, which copies the rest"
        ) from None


def _names(store: str, reference_id: str) -> set[str]:
    """Names of the files that a place holds of a reference; nothing is fetched."""
    files, root = _opened(store)
    try:
        return {_last(path) for path in files.ls(f"{root}/{reference_id}", detail=False)}
    except FileNotFoundError:
        return set()


def _opened(store: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.url_to_fs(store if is_url(store) else str(Path(store).expanduser().resolve()))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"store {store}: {error} (for s3:// install refscore with the extra 's3')") from None
    files.invalidate_cache()
    return files, root


def _last(path: object) -> str:
    return str(path).rstrip("/").rsplit("/", 1)[-1]


def _identity(described: Any) -> ReferenceIdentity | None:
    try:
        return ReferenceIdentity.from_described(described) if isinstance(described, dict) else None
    except DataError:
        return None
