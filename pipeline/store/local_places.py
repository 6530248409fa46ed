"""Shards in a local directory, which may be shared by machines: published by hard links, set aside in `corrupt/` if damaged."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

from pipeline.artifacts import durable
from pipeline.artifacts.digests import files_sha256
from pipeline.errors import RefscoreError, first_line
from pipeline.store.index.index_file import INDEX, LocalBytes
from pipeline.store.index.indexes import Indexes
from pipeline.store.index.merging import FOLDER
from pipeline.store.places import ADOPTION, Entry, Listing, NotThere
from pipeline.store.shard import SHARD, OpenShard, Unsound, check_shard, digest_in, open_shard, sha256_now, shard_names

log = logging.getLogger(__name__)


class LocalPlace:
    """A directory; see `pipeline.store.places.Place`. Opening creates nothing; listing creates `corrupt/` if there is something to
    set aside.

    `first` is the place that is written: it need not exist yet, if it can be made.
    """

    def __init__(self, directory: Path, *, first: bool = True) -> None:
        self.directory, self._first = directory, first
        self._unsound: set[str] = set()
        self._listing: Listing | None = None
        self.indexes = Indexes(self)

    @property
    def name(self) -> str:
        return str(self.directory)

    def listed(self, within: float = 0) -> Listing:
        """See `Place.listed`."""
        if self._listing is None or not self._listing.young(within):
            self._must_be_readable()
            moment = time.monotonic()
            shards = [name for name in shard_names(self.directory) if name not in self._unsound]
            adoptions = sorted(path.name for path in self.directory.glob("*.json") if ADOPTION.fullmatch(path.name))
            self._listing = Listing(shards, sorted(_index_files(self.directory / FOLDER)), adoptions, moment)
        return self._listing

    def sound(self, shards: Sequence[str]) -> list[str]:
        """See `Place.sound`. Files are read once and remembered (`pipeline.artifacts.digests`)."""
        paths = {self.directory / name: name for name in shards}
        try:
            digests = files_sha256(list(paths))
        except FileNotFoundError as error:
            # compacted away or set aside by someone else meanwhile
            raise NotThere(Path(error.filename).name, first_line(error)) from None
        except PermissionError as error:
            raise RefscoreError(
                f"{error.filename} may not be read by this user: ask for the right to read it, or leave its place "
                "out of reference.store"
            ) from None
        return [
            name
            for path, name in paths.items()
            # examined it may be sound: published anew since it was listed
            if digests[path] == digest_in(name) or self.examine(name, "its bytes are not those that were published")
        ]

    @contextmanager
    def opened(self, shard: str) -> Iterator[OpenShard]:
        """See `Place.opened`."""
        try:
            with open_shard(self.directory / shard) as file:
                yield file
        except FileNotFoundError:
            raise NotThere(shard) from None

    @contextmanager
    def whole(self, shard: str) -> Iterator[Path]:
        """See `Place.whole`: the shard itself."""
        if not self.sound([shard]):
            raise Unsound("its bytes are not those that were published")
        yield self.directory / shard

    def examine(self, shard: str, problem: str) -> bool:
        """See `Place.examine`."""
        try:
            damage = set_aside_if_damaged(self.directory / shard)
        except FileNotFoundError:
            return False
        if damage is None:
            log.debug("%s: %s, but it is sound when read again", shard, problem)
            return True
        self._unsound.add(shard)
        self._listing = None
        return False

    def publish(self, file: Path, name: str) -> None:
        """See `Place.publish`: a hard link, which cannot replace."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / name
        try:
            os.link(file, final)
        except FileExistsError:
            if not _same_bytes(final, file):
                log.warning("%s was damaged: the same rows, published again, take its place", final)
                _copy(file, final)
        except OSError as error:
            if error.errno not in durable.NO_LINKS:
                raise
            if not _same_bytes(final, file):
                _copy(file, final)
        self._unsound.discard(name)
        self._listing = None
        durable.reached("publish: linked")
        durable.flush(self.directory)
        durable.reached("publish: directory flushed")
        if SHARD.fullmatch(name):
            self.indexes.published(file, name)

    def bytes_of(self, name: str) -> LocalBytes:
        """See `Files.bytes_of`."""
        return LocalBytes(self.directory / name)

    def put(self, file: Path, name: str) -> None:
        """See `Files.put`."""
        final = self.directory / name
        final.parent.mkdir(exist_ok=True)
        file.replace(final)
        self._listing = None

    def index_files(self) -> dict[str, int]:
        """See `Files.index_files`."""
        return _index_files(self.directory / FOLDER)

    def why_not_writable(self) -> str | None:
        """See `Place.why_not_writable`: by writing, as rights alone do not tell of read-only mounts."""
        place = _nearest_existing(self.directory)
        probe = place / f"{durable.TEMPORARY}probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            return f"{place}: {error.strerror or first_line(error)}"
        return None

    def workspace(self) -> Path:
        """See `Place.workspace`: the same directory, as a link cannot cross file systems."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RefscoreError(f"{self.directory / name} cannot be read ({error.strerror}): mend its rights") from None

    def remove(self, name: str) -> None:
        """See `Files.remove`; directories that are empty then are removed too."""
        self._listing = None
        path = self.directory / name
        try:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for folder in (path.parent, *path.parent.parents)[: len(Path(name).parts)]:
                    folder.rmdir()
        except OSError as error:
            raise RefscoreError(
                f"{self.directory / name} cannot be removed ({error.strerror}): mend its rights"
            ) from None

    def _must_be_readable(self) -> None:
        """An absent or unreadable place must not pass for an empty one: everything would be scored again."""
        place = self.directory.parent
        try:
            next((self.directory if self.directory.exists() else place).iterdir(), None)
        except FileNotFoundError:
            if not self._first:
                raise RefscoreError(
                    f"store {place} does not exist: mount it, correct its name in reference.store, or leave it out; only the "
                    "first place of a list is made if it is absent"
                ) from None
            if problem := self.why_not_writable():
                raise RefscoreError(
                    f"store {place} does not exist and cannot be made ({problem}): mount it, or name another place in "
                    "reference.store"
                ) from None
        except NotADirectoryError:
            raise RefscoreError(
                f"store {place} is no directory, so it cannot be written or read: name a directory in reference.store"
            ) from None
        except OSError as error:
            raise RefscoreError(
                f"store {self.directory} cannot be listed ({error.strerror or first_line(error)}): mend its rights, or leave "
                "it out of reference.store"
            ) from None

    def open(self, name: str) -> BinaryIO:
        """See `Place.open`."""
        try:
            return (self.directory / name).open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RefscoreError(f"{self.directory / name} cannot be read ({error.strerror}): mend its rights") from None

    def local(self, name: str, folder: Path) -> Path:  # noqa: ARG002  # nothing is copied
        """See `Place.local`: the file itself."""
        self.open(name).close()
        return self.directory / name

    def entries(self) -> list[Entry]:
        """See `Place.entries`. A link counts as what it leads to; one to nothing, or to a directory, is left out."""
        self._must_be_readable()
        found = []
        for folder, _, names in os.walk(self.directory):
            for path in (Path(folder) / name for name in names):
                # what is removed meanwhile is not there
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append(Entry(path.relative_to(self.directory).as_posix(), status.st_size, status.st_mtime))
        return sorted(found, key=attrgetter("name"))

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        self._listing = None
        with durable.replacing(self.directory / name) as temporary:
            temporary.write_bytes(content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Place.create`."""
        path = self.directory / name
        with durable.explaining_disk(path):
            while True:
                durable.make_directory(path.parent)
                try:
                    with path.open("xb") as file:
                        file.write(content)
                except FileExistsError:
                    return False
                except FileNotFoundError:
                    continue  # the directory was empty, and another process removed it
                return True

    def set_aside(self, name: str) -> str | None:
        """See `Place.set_aside`."""
        problem = set_aside_if_damaged(self.directory / name)
        if problem:
            self._unsound.add(name)
            self._listing = None
        return problem


def _index_files(directory: Path) -> dict[str, int]:
    """Names and sizes."""
    try:
        found = [path for path in directory.iterdir() if INDEX.fullmatch(path.name) and path.is_file()]
    except OSError:
        return {}  # there is none, or none that this user may see: shards are read instead
    sizes = {}
    for path in found:
        with suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    return sizes


def set_aside_if_damaged(shard: Path) -> str | None:
    """Look at a shard anew and, if it is damaged, move it to `corrupt/`, where no reader looks, and say so once.

    Returns what is wrong with it, None if it is sound. Somebody may publish the same name again meanwhile: only the very file
    that was looked at is moved. Raises FileNotFoundError if it is gone.
    """
    looked_at = _file(shard)
    problem = check_shard(shard)
    if problem is None:
        return None
    corrupt = shard.parent / "corrupt"
    aside = corrupt / shard.name
    try:
        corrupt.mkdir(exist_ok=True)
        shard.rename(aside)
    except FileNotFoundError:
        return problem  # another reader was first
    except OSError:
        log.warning("%s: %s; it cannot be moved, its rows count as not scored", shard, problem)
        return problem
    if _file(aside) != looked_at:
        _give_back(aside, shard)
        return check_shard(shard)
    with suppress(OSError):
        os.utime(aside)  # since when it lies there: for a day nobody deletes it
    log.warning("%s: %s; set aside in %s, its rows count as not scored", shard.name, problem, corrupt)
    return problem


def _file(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _give_back(aside: Path, shard: Path) -> None:
    try:
        os.link(aside, shard)
    except FileExistsError:
        pass  # published once more
    except OSError:
        aside.rename(shard)
        return
    aside.unlink(missing_ok=True)


def _same_bytes(final: Path, file: Path) -> bool:
    """Whether what stands under the final name has the bytes of `file`; a link to nothing and a missing file have not."""
    try:
        return sha256_now(final) == sha256_now(file)
    except FileNotFoundError:
        if not file.exists():
            raise
        return False
    except OSError:
        return False


def _copy(file: Path, final: Path) -> None:
    """A copy of `file` under the final name, in one step, whatever stood there."""
    temporary = durable.temporary_beside(final)
    try:
        shutil.copyfile(file, temporary)
        durable.flush(temporary)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
