"""Where shards lie: a local directory, or any place fsspec reaches (`s3://...`). One reference's files on one place.

A shelf lists and hands out immutable files and takes new ones, never replacing any. Shards carry the sha256 of their
bytes in their name; a remote shard is copied into a local cache once, under that name, and checked there.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Protocol

from pipeline import durable
from pipeline.digests import file_sha256, files_sha256
from pipeline.errors import ConfigError, RefscoreError, first_line

log = logging.getLogger(__name__)

SHARD = re.compile(r"scores-([0-9a-f]{64})\.parquet")
CACHE = Path("data/cache/shards")


def is_url(place: str) -> bool:
    """Whether a store's place is a URL and no local path."""
    return "://" in place


class Shelf(Protocol):
    """One reference's part of one place."""

    @property
    def name(self) -> str:
        """The place, for messages."""
        ...

    def shards(self) -> list[Path]:
        """Local paths of every shard whose bytes are those that were published; damaged ones are set aside."""
        ...

    def publish(self, file: Path, name: str) -> None:
        """Make a finished local file visible as `name`, durably, unless that name exists."""
        ...

    def why_not_writable(self) -> str | None:
        """Why nothing can be published here; None if it can. Leaves nothing behind."""
        ...

    def workspace(self) -> Path:
        """A local directory in which to write what will be published."""
        ...


def open_shelf(place: str, reference_id: str) -> Shelf:
    """The shelf of a reference at a local directory or URL."""
    return RemoteShelf(place, reference_id) if is_url(place) else LocalShelf(Path(place).expanduser() / reference_id)


class LocalShelf:
    """A directory; see `Shelf`. Opening and listing create nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def name(self) -> str:
        return str(self.directory)

    def shards(self) -> list[Path]:
        """See `Shelf.shards`. Files are read once and remembered by size, mtime and inode."""
        while True:
            shards = shard_files(self.directory)
            try:
                digests = files_sha256(shards)
                break
            except FileNotFoundError:
                continue  # compacted away or set aside by someone else meanwhile: list again
        sound = []
        for shard in shards:
            if digests[shard] == digest_in(shard.name):
                sound.append(shard)
            else:
                set_aside(shard, "its bytes are not those that were published")
        return sound

    def publish(self, file: Path, name: str) -> None:
        """See `Shelf.publish`: a hard link, which cannot replace."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / name
        try:
            os.link(file, final)
        except FileExistsError:
            log.debug("%s was published before with the same bytes", name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK):
                raise
            # a file system without hard links: the name is a digest, so what it might replace has the same bytes
            if not final.exists():
                shutil.copyfile(file, beside := durable.temporary_beside(final))
                durable.flush(beside)
                beside.rename(final)
        durable.reached("publish: linked")
        durable.flush(self.directory)
        durable.reached("publish: directory flushed")

    def why_not_writable(self) -> str | None:
        """See `Shelf.why_not_writable`: by writing, as rights alone do not tell of read-only mounts."""
        place = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        probe = place / f"{durable.TEMPORARY}probe-{secrets.token_hex(4)}"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            return f"{place}: {error.strerror}"
        return None

    def workspace(self) -> Path:
        """See `Shelf.workspace`: the same directory, as a link cannot cross file systems."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory


class RemoteShelf:
    """A place that fsspec reaches; see `Shelf`."""

    def __init__(self, url: str, reference_id: str) -> None:
        import fsspec

        self._url = f"{url.rstrip('/')}/{reference_id}"
        try:
            self._files, self._root = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"store {url}: {error} (for s3:// install refscore with the extra 's3')") from None
        self._cache = CACHE / reference_id

    @property
    def name(self) -> str:
        return self._url

    def shards(self) -> list[Path]:
        """See `Shelf.shards`; fetches what the local cache lacks."""
        names = [name for name in self._names() if SHARD.fullmatch(name)]
        return [path for name in names if (path := self._fetched(name)) is not None]

    def publish(self, file: Path, name: str) -> None:
        """See `Shelf.publish`: put-if-absent."""
        self._put(name, file.read_bytes())
        durable.reached("publish: linked")
        if SHARD.fullmatch(name):
            LocalShelf(self._cache).publish(file, name)

    def why_not_writable(self) -> str | None:
        """See `Shelf.why_not_writable`: by writing and removing an empty object."""
        probe = f"{self._root}/{durable.TEMPORARY}probe-{secrets.token_hex(4)}"
        try:
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)
        except Exception as error:  # noqa: BLE001  # every fsspec backend has errors of its own
            return f"{self._url}: {first_line(error)}"
        return None

    def workspace(self) -> Path:
        """See `Shelf.workspace`: the local cache."""
        self._cache.mkdir(parents=True, exist_ok=True)
        return self._cache

    def _names(self) -> list[str]:
        try:
            self._files.invalidate_cache()
            return sorted(str(path).rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:  # noqa: BLE001  # credentials, network, rights: each backend has errors of its own
            raise RefscoreError(
                f"store {self._url} cannot be listed ({first_line(error)}): check the URL, the network and the "
                "credentials in the environment, or leave this place out of reference.store"
            ) from None

    def _fetched(self, name: str) -> Path | None:
        local = self._cache / name
        if local.exists() and file_sha256(local) == digest_in(name):
            return local
        with durable.replacing(local) as temporary:
            self._files.get_file(f"{self._root}/{name}", str(temporary))
        if file_sha256(local) == digest_in(name):
            return local
        set_aside(local, f"the copy at {self._url} has not the bytes that were published")
        return None

    def _put(self, name: str, content: bytes) -> None:
        try:
            self._files.pipe_file(f"{self._root}/{name}", content, mode="create")
        except FileExistsError:
            log.debug("%s was published before", name)
        except NotImplementedError:
            # a backend without conditional writes: the name decides the content, so writing it twice changes nothing
            if not self._files.exists(f"{self._root}/{name}"):
                self._files.pipe_file(f"{self._root}/{name}", content)
        except Exception as error:  # noqa: BLE001  # likewise
            raise RefscoreError(
                f"{name} cannot be published to {self._url} ({first_line(error)}); what was published before stays"
            ) from None


def shard_files(directory: Path) -> list[Path]:
    """Every file that is named as a shard, sound or not; a link to nothing is none."""
    return sorted(path for path in directory.glob("scores-*.parquet") if SHARD.fullmatch(path.name) and path.is_file())


def digest_in(name: str) -> str | None:
    """The sha256 that a shard's name promises."""
    found = SHARD.fullmatch(name)
    return found.group(1) if found else None


def set_aside(shard: Path, problem: str) -> None:
    """Move a damaged shard to `corrupt/`, where no reader looks, and say so once."""
    corrupt = shard.parent / "corrupt"
    try:
        corrupt.mkdir(exist_ok=True)
        shard.rename(corrupt / shard.name)
        log.warning("%s: %s; set aside in %s, its rows count as not scored", shard.name, problem, corrupt)
    except OSError:
        log.warning("%s: %s; it cannot be moved, its rows count as not scored", shard, problem)
