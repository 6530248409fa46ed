"""Shards at a place that fsspec reaches (`s3://...`): listed as a whole, and read in the pieces that are needed, which are kept
in a local cache (`pipeline.store.pieces`).

Objects are published by put-if-absent, if the place knows that. A small object's bytes are compared with its name when it is
fetched; of a large one rows are checked as ever, and all of its bytes if one of these fails. A damaged object is read no more by
this process, and the next publication of the same name replaces it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.artifacts import durable
from pipeline.artifacts.shelf import Shelf
from pipeline.errors import ConfigError, RefscoreError, first_line
from pipeline.store.index.index_file import INDEX
from pipeline.store.index.indexes import Indexes
from pipeline.store.index.merging import FOLDER
from pipeline.store.pieces import PIECE, NotFetched, Pieces
from pipeline.store.places import ADOPTION, Entry, Listing, NotThere
from pipeline.store.shard import SHARD, OpenShard, Unsound, check_shard, digest_in, open_shard

log = logging.getLogger(__name__)

CACHE = durable.CACHE / "shards"


class RemotePlace:
    """A place that fsspec reaches; see `pipeline.store.places.Place`."""

    def __init__(self, url: str, reference_id: str) -> None:
        import fsspec

        self._url = f"{url.rstrip('/')}/{reference_id}"
        try:
            self._files, self._root = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"store {url}: {error} (for s3:// install refscore with the extra 's3')") from None
        except Exception as error:  # noqa: BLE001  # some backends connect here, each with errors of its own
            raise RefscoreError(
                f"store {url} cannot be reached ({first_line(error)}): check the URL, the network and the credentials in the "
                "environment, or leave this place out of reference.store"
            ) from None
        self._cache = CACHE
        self._shelf = Shelf(CACHE)
        self._unsound: set[str] = set()
        self._listing: Listing | None = None
        # of what was listed; of index files what was listed last, as threads list shards or index files
        self._infos: dict[str, dict[str, Any]] = {}
        self._of_indexes: dict[str, dict[str, Any]] = {}
        self.indexes = Indexes(self)

    @property
    def name(self) -> str:
        return self._url

    def listed(self, within: float = 0) -> Listing:
        """See `Place.listed`."""
        if self._listing is None or not self._listing.young(within):
            moment = time.monotonic()
            self._infos = self._list()
            shards = sorted(name for name in self._infos if SHARD.fullmatch(name) and name not in self._unsound)
            below = [name.removeprefix(f"{FOLDER}/") for name in self._infos if name.startswith(f"{FOLDER}/")]
            indexes = sorted(name for name in below if INDEX.fullmatch(name))
            self._of_indexes |= {name: self._infos[f"{FOLDER}/{name}"] for name in indexes}
            self._listing = Listing(shards, indexes, sorted(filter(ADOPTION.fullmatch, self._infos)), moment)
        return self._listing

    def sound(self, shards: Sequence[str]) -> list[str]:
        """See `Place.sound`: nothing is fetched to know."""
        return [name for name in shards if name not in self._unsound]

    @contextmanager
    def opened(self, shard: str) -> Iterator[OpenShard]:
        """See `Place.opened`: what is read of it is fetched."""
        pieces = self._pieces(shard, shard, self._infos[shard]["size"] if shard in self._infos else 0)
        try:
            with open_shard(Path(shard), pieces) as file:
                yield file
        except (Unsound, FileNotFoundError):
            if pieces.failure:
                raise NotThere(shard, str(pieces.failure)) from None
            raise

    @contextmanager
    def whole(self, shard: str) -> Iterator[Path]:
        """See `Place.whole`: a copy, for the moment."""
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=durable.TEMPORARY, dir=self._cache) as directory:
            path = Path(directory) / shard
            try:
                with durable.explaining_disk(path):
                    self._files.get_file(f"{self._root}/{shard}", str(path))
            except RefscoreError:
                raise
            except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
                raise NotThere(shard, first_line(error)) from None
            if damage := check_shard(path):
                self._unsound.add(shard)
                self._listing = None
                log.warning("the object %s/%s is damaged (%s): its rows count as not scored", self._url, shard, damage)
                raise Unsound(damage)
            yield path

    def examine(self, shard: str, problem: str) -> bool:
        """See `Place.examine`: the object is fetched anew, and its pieces with it."""
        try:
            with self.whole(shard) as path:
                log.debug("%s: %s, but it is sound when fetched again", shard, problem)
                self._keep(shard, path)
        except (NotThere, Unsound):
            return False
        return True

    def publish(self, file: Path, name: str) -> None:
        """See `Place.publish`: put-if-absent; an object that has other bytes is replaced."""
        self._put(name, file.read_bytes())
        self._unsound.discard(name)
        self._listing = None
        durable.reached("publish: linked")
        if SHARD.fullmatch(name):
            self._keep(name, file)
            self.indexes.published(file, name)

    def bytes_of(self, name: str) -> Pieces:
        """See `Files.bytes_of`."""
        # unlike a shard's its name does not tell its bytes
        info = self._of_indexes[name.removeprefix(f"{FOLDER}/")]
        version = [info.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified")]
        called = hashlib.sha256(f"{self._url}/{name} {version}".encode()).hexdigest()
        return self._pieces(name, called, info["size"])

    def index_files(self) -> dict[str, int]:
        """See `Files.index_files`."""
        try:
            with self._explaining(FOLDER, "listed"):
                self._files.invalidate_cache()
                listed = self._files.ls(f"{self._root}/{FOLDER}", detail=True)
        except FileNotFoundError:
            return {}
        named = {str(info["name"]).rstrip("/").rsplit("/", 1)[-1]: info for info in listed}
        found = {name: info for name, info in named.items() if INDEX.fullmatch(name)}
        self._of_indexes |= found
        return {name: info["size"] for name, info in found.items()}

    def put(self, file: Path, name: str) -> None:
        """See `Files.put`."""
        self._listing = None
        with self._explaining(name, "written"):
            self._files.put_file(str(file), f"{self._root}/{name}")

    def remove(self, name: str) -> None:
        """See `Files.remove`."""
        self._listing = None
        with suppress(FileNotFoundError), self._explaining(name, "removed"):
            self._files.rm_file(f"{self._root}/{name}")

    def why_not_writable(self) -> str | None:
        """See `Place.why_not_writable`: by writing an empty object, always the same one: some may write and not delete."""
        probe = f"{self._root}/{durable.TEMPORARY}probe"
        try:
            self._files.pipe_file(probe, b"")
        except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
            return f"{self._url}: {first_line(error)}"
        try:
            self._files.rm_file(probe)
        except Exception as error:  # noqa: BLE001  # likewise
            log.debug("%s cannot be removed (%s)", probe, first_line(error))
        return None

    def workspace(self) -> Path:
        """See `Place.workspace`: the local cache."""
        self._cache.mkdir(parents=True, exist_ok=True)
        return self._cache

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        self._files.invalidate_cache()
        try:
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise RefscoreError(
                f"{self._url}/{name} cannot be read ({first_line(error)}): check the network and the credentials in the environment"
            ) from None
        return content

    def _list(self) -> dict[str, dict[str, Any]]:
        """What lies below the reference and in its folder of indexes, by its name there."""
        found: dict[str, dict[str, Any]] = {}
        try:
            self._files.invalidate_cache()
            for folder in ("", f"{FOLDER}/"):
                # unlike `find`, this fails if the place cannot be reached
                for info in self._files.ls(f"{self._root}/{folder}".rstrip("/"), detail=True):
                    found[folder + str(info["name"]).rstrip("/").rsplit("/", 1)[-1]] = info
                if FOLDER not in found:
                    break
        except FileNotFoundError:
            return found
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise self._unlisted(error) from None
        return found

    def _unlisted(self, error: Exception) -> RefscoreError:
        return RefscoreError(
            f"store {self._url} cannot be listed ({first_line(error)}): check the URL, the network and the "
            "credentials in the environment, or leave this place out of reference.store"
        )

    def _pieces(self, name: str, called: str, size: int) -> Pieces:
        def fetch(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            path = f"{self._root}/{name}"
            begins, ends = zip(*ranges, strict=True)
            try:
                contents: list[Any] = self._files.cat_ranges([path] * len(ranges), list(begins), list(ends))
            except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
                contents = [error]
            for content, (begin, end) in zip(contents, ranges, strict=False):
                if isinstance(content, Exception):
                    raise NotFetched(first_line(content))
                if len(content) != end - begin:
                    raise NotFetched("it has not the bytes that it was listed with")
            if ranges == [(0, size)] and digest_in(name) not in (None, hashlib.sha256(contents[0]).hexdigest()):
                raise Unsound("its bytes are not those that were published")
            return contents

        return Pieces(self._shelf, called, size, fetch)

    def _keep(self, shard: str, path: Path) -> None:
        """Keep the pieces of a shard of which `path` is a sound copy."""
        with path.open("rb") as file:
            self._pieces(shard, shard, path.stat().st_size).keep(iter(lambda: file.read(PIECE), b""))

    def _put(self, name: str, content: bytes) -> None:
        path = f"{self._root}/{name}"
        try:
            try:
                self._files.pipe_file(path, content, mode="create")
                return
            except FileExistsError:
                log.debug("%s was published before", name)
            except NotImplementedError:
                # a backend without conditional writes: the name decides the content, so writing it twice changes nothing
                log.debug("%s knows no put-if-absent", self._url)
            if not self._holds(path, content):
                self._files.pipe_file(path, content)
        except Exception as error:  # noqa: BLE001  # likewise
            raise RefscoreError(
                f"{name} cannot be published to {self._url} ({first_line(error)}); what was published before stays"
            ) from None

    def _holds(self, path: str, content: bytes) -> bool:
        self._files.invalidate_cache()
        try:
            held: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return False
        if held != content:
            log.warning("%s was damaged: the same content, published again, takes its place", path)
        return held == content

    def open(self, name: str) -> BinaryIO:
        """See `Place.open`: what is asked for is fetched, and nothing around it."""
        with self._explaining(name, "read"):
            file: BinaryIO = self._files.open(f"{self._root}/{name}", "rb", cache_type="none")
            return file

    def local(self, name: str, folder: Path) -> Path:
        """See `Place.local`: a copy."""
        with self._explaining(name, "read"):
            self._files.get_file(f"{self._root}/{name}", str(folder / name))
        return folder / name

    def entries(self) -> list[Entry]:
        """See `Place.entries`: one request for each thousand objects."""
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._root, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise self._unlisted(error) from None
        start = len(self._root) + 1
        return sorted(
            (Entry(path[start:], int(details.get("size") or 0), _changed(details)) for path, details in found.items()),
            key=attrgetter("name"),
        )

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        self._listing = None
        with self._explaining(name, "written"):
            self._files.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Place.create`: put-if-absent. Where that is not known, of two at one moment both are told that it was theirs."""
        path = f"{self._root}/{name}"
        with self._explaining(name, "written"):
            try:
                self._files.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except NotImplementedError:
                self._files.invalidate_cache()
                if self._files.exists(path):
                    return False
                self._files.pipe_file(path, content)
        return True

    def set_aside(self, name: str) -> str | None:
        """See `Place.set_aside`: the object is fetched. One that was replaced meanwhile stays."""
        path, aside = f"{self._root}/{name}", f"{self._root}/corrupt/{name}"
        with tempfile.TemporaryDirectory(dir=durable.scratch_place()) as folder:
            with self._explaining(name, "read"):
                before = self._known_by(path)
            problem = check_shard(self.local(name, Path(folder)))
        if problem is None:
            return None
        self._unsound.add(name)
        self._listing = None
        try:
            if self._known_by(path) == before:
                self._files.cp_file(path, aside)
                self._files.rm_file(path)
                log.warning("%s: %s; set aside in %s/corrupt, its rows count as not scored", name, problem, self._url)
        except Exception as error:  # noqa: BLE001  # likewise
            log.warning(
                "%s/%s: %s; it cannot be moved (%s), its rows count as not scored",
                self._url,
                name,
                problem,
                first_line(error),
            )
        return problem

    def _known_by(self, path: str) -> str:
        """What an object is known by while it does not change."""
        self._files.invalidate_cache()
        known: str = self._files.ukey(path)
        return known

    @contextmanager
    def _explaining(self, name: str, what: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, RefscoreError):
            raise
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise RefscoreError(
                f"{self._url}/{name} cannot be {what} ({first_line(error)}): check the network, your rights and the credentials in "
                "the environment"
            ) from None


def _changed(details: dict[str, Any]) -> float:
    """When an object changed, in seconds since 1970; now if the place does not say."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        said = details.get(name)
        if isinstance(said, datetime):
            return said.timestamp()
        if isinstance(said, int | float):
            return float(said)
    return time.time()
