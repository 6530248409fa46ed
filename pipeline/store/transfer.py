"""Scores from one store into another: whole shards as they are, or the rows that a data set needs.

A copy keeps when its rows were published and under which circumstances, so that of two copies of a key the same one counts in
every store. What arrives is checked like everything that is published, before it is published; a shard that is not sound is
left out and named. Nothing sound at the source is changed.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import durable
from pipeline.artifacts.tables import about_in
from pipeline.errors import CheckError, ConfigError, DataError, RefscoreError, first_line
from pipeline.progress import SILENT, Listener
from pipeline.store.fixed_point import FIXED_POINT
from pipeline.store.identity import IMPORTED, ReferenceIdentity
from pipeline.store.places import NotThere, Place, is_url
from pipeline.store.shard import (
    Unsound,
    check_shard,
    computed_by,
    digest_in,
    open_shard,
    published_at,
    sha256_now,
    sums_only,
)
from pipeline.store.store import Store, open_place

log = logging.getLogger(__name__)

_REFERENCE = re.compile(r"[0-9a-f]{64}")


@dataclass
class Copied:
    """Of one reference: shards and rows that were copied, rows (or shards, if these are copied whole) that were there, and
    shards that are not sound: their names, and why.
    """

    reference_id: str
    shards: int = 0
    rows: int = 0
    there: int = 0
    unsound: dict[str, str] = field(default_factory=dict)


def described_references(store: str) -> dict[str, ReferenceIdentity]:
    """The references at a place, a directory or a URL, by id. Those of another version are left out; so are those whose
    description cannot be read, with a warning.

    Raises DataError if there is no such place or it is a file, RefscoreError if it cannot be listed.
    """
    files, root = _opened(store)
    try:
        found = {}
        for name in reference_names(store):
            try:
                identity = _identity(files.cat_file(f"{root}/{name}/reference.json"))
                if identity and identity.reference_id == name:
                    found[name] = identity
            except FileNotFoundError:
                pass
            except (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
                log.warning(
                    "%s/%s/reference.json cannot be read (%s): this reference is left out",
                    store,
                    name,
                    first_line(error),
                )
    except RefscoreError:
        raise
    except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
        raise _unlisted(store, error) from None
    return found


def reference_names(store: str) -> list[str]:
    """What at a place, a directory or a URL, is named like a reference, sorted. Raises as `described_references` does."""
    files, root = _opened(store)
    try:
        if files.isfile(root):
            raise DataError(f"store {store} is a file: name the directory that holds the references")
        return sorted(filter(_REFERENCE.fullmatch, map(_last, files.ls(root, detail=False))))
    except FileNotFoundError:
        raise DataError(
            f"store {store} does not exist: check its name; 'refscore precompute' makes the first of reference.store"
        ) from None
    except RefscoreError:
        raise
    except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
        raise _unlisted(store, error) from None


def copy_shards(
    source: str, target: str, identities: Collection[ReferenceIdentity], listener: Listener = SILENT
) -> list[Copied]:
    """Copy every shard of these references that `target` lacks. Raises RefscoreError if a place refuses."""
    copies = []
    for identity in identities:
        copied = Copied(identity.reference_id)
        origin = open_place(source, identity.reference_id, first=False)
        destination = open_place(target, identity.reference_id, first=True)
        shards, held = origin.listed().shards, set(destination.sound(destination.listed().shards))
        with listener.progress(f"{identity.reference_id[:12]} shards", len(shards)) as ticker:
            for shard in shards:
                if shard in held:
                    copied.there += 1
                else:
                    with _whole(origin, shard, copied) as path:
                        if path:
                            _copy_shard(path, destination, identity, copied)
                ticker.advance(1, f"{copied.rows:,} sequences")
        destination.indexes.finish()
        copies.append(copied)
    return copies


def copy_rows(
    keys: pa.FixedSizeBinaryArray, source: str, target: str, identity: ReferenceIdentity, listener: Listener = SILENT
) -> Copied:
    """Copy the rows of `keys` that `source` has and `target` has not; reads shards until it has them all.

    Raises RefscoreError if a place refuses.
    """
    copied = Copied(identity.reference_id)
    _opened(target)
    destination = Store([target], identity)
    there = destination.lookup(keys)
    copied.there = len(there.held)
    wanted = keys.take(pa.array(there.missing))
    if not len(wanted):
        return copied
    origin = open_place(source, identity.reference_id, first=False)
    shards = origin.listed().shards
    with listener.progress(f"{identity.reference_id[:12]} shards", len(shards)) as ticker:
        for shard in shards:
            if not len(wanted):
                break
            with _whole(origin, shard, copied) as path:
                wanted = _copy_wanted(wanted, path, destination, copied) if path else wanted
            ticker.advance(1, f"{copied.rows:,} sequences")
    destination.finish()
    return copied


@contextmanager
def _whole(origin: Place, shard: str, copied: Copied) -> Iterator[Path | None]:
    """A local file with a shard's bytes; None if they are not sound, which is noted. Raises RefscoreError if it is gone."""
    with ExitStack() as stack:
        path = None
        try:
            path = stack.enter_context(origin.whole(shard))
        except Unsound as problem:
            copied.unsound[shard] = str(problem)
        except NotThere as gone:
            raise _gone(Path(origin.name) / shard, gone) from None
        yield path


def _copy_wanted(
    wanted: pa.FixedSizeBinaryArray, shard: Path, destination: Store, copied: Copied
) -> pa.FixedSizeBinaryArray:
    """Publish what one shard has of the keys; returns those that are still wanted."""
    try:
        table, said = _read(shard)
        fresh = table.filter(pc.is_in(table["key"], value_set=wanted)).combine_chunks()
        if len(fresh):
            destination.publish_table(fresh, **said)
    except (Unsound, CheckError) as problem:
        copied.unsound[shard.name] = first_line(problem)
        return wanted
    if not len(fresh):
        return wanted
    copied.shards += 1
    copied.rows += len(fresh)
    # a key that stands in a later shard too is copied once
    return wanted.filter(pc.invert(pc.is_in(wanted, value_set=fresh["key"].combine_chunks())))


def _copy_shard(shard: Path, destination: Place, identity: ReferenceIdentity, copied: Copied) -> None:
    """Publish a shard under its own name, if its bytes are those that the name promises and its rows can be true."""
    with durable.explaining_disk(Path(destination.name), shard.stat().st_size):
        workspace = destination.workspace()
        temporary = durable.temporary_beside(workspace / shard.name)
        described = temporary.with_name(f"{temporary.name}.json")
        try:
            problem = check_shard(shard) or _unfit(shard, identity)
            if problem is None:
                shutil.copyfile(shard, temporary)
                durable.flush(temporary)
                # what was checked is what is published: the same digest
                problem = None if sha256_now(temporary) == digest_in(shard.name) else "it changed while it was copied"
            if problem is not None:
                copied.unsound[shard.name] = problem
                return
            rows = len(_read(shard)[0])
            described.write_text(json.dumps(identity.described(), indent=2) + "\n", encoding="utf-8")
            destination.publish(described, "reference.json")
            destination.publish(temporary, shard.name)
        except FileNotFoundError as error:
            raise _gone(shard, error) from None
        finally:
            temporary.unlink(missing_ok=True)
            described.unlink(missing_ok=True)
    copied.shards += 1
    copied.rows += rows


def _read(shard: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A shard's rows, and what it says of them: circumstances, when they were published, and who computed them if it was another
    reference. Raises Unsound, RefscoreError if it is gone.
    """
    try:
        with open_shard(shard) as file:
            said = about_in(file.schema_arrow).get("circumstances")
            circumstances = [item for item in said if isinstance(item, dict)] if isinstance(said, list) else []
            about = {"circumstances": circumstances, "published": published_at(file), "computed_by": computed_by(file)}
            return file.read(), about
    except FileNotFoundError as error:
        raise _gone(shard, error) from None


def _unfit(shard: Path, identity: ReferenceIdentity) -> str | None:
    """Why a sound shard may not stand for a reference: only of scores that were imported may sums be all that is known, and only
    where the reference says so may values be rounded.
    """
    with open_shard(shard) as file:
        if sums_only(file) and identity.numerics.engine != IMPORTED:
            return "it holds sums only, and its reference's scores are of tokens"
        if file.rounded and identity.numerics.logps != FIXED_POINT:
            return "it holds logps in fixed point, and its reference's are exact"
    return None


def _gone(shard: Path, error: Exception) -> RefscoreError:
    return RefscoreError(
        f"{shard} cannot be copied ({first_line(error)}): run the same command again, which copies the rest"
    )


def _opened(store: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.url_to_fs(store if is_url(store) else str(Path(store).expanduser().resolve()))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"store {store}: {error} (for s3:// install refscore with the extra 's3')") from None
    except Exception as error:  # noqa: BLE001  # some backends connect here, each with errors of its own
        raise _unlisted(store, error) from None
    files.invalidate_cache()
    return files, root


def _unlisted(store: str, error: Exception) -> RefscoreError:
    return RefscoreError(
        f"store {store} cannot be listed ({first_line(error)}): check the name, the network and the credentials in the "
        "environment"
    )


def _last(path: object) -> str:
    return str(path).rstrip("/").rsplit("/", 1)[-1]


def _identity(content: bytes) -> ReferenceIdentity | None:
    """What a reference.json describes; None if another version wrote it, or nobody. Raises ValueError if it is no JSON."""
    described = json.loads(content)
    try:
        return ReferenceIdentity.from_described(described) if isinstance(described, dict) else None
    except DataError:
        return None
