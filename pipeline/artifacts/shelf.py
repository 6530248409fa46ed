"""A directory of immutable files that is bounded by bytes: what was used least recently goes first, what is in use stays.

Owns which files go. A name decides its file's content, so whoever misses a file makes the same one again. Many processes may
share a shelf. Beside the files lie, in `.shelf/`: `used/<name>`, which changed when the file was last used (a time of the file
itself would make its digest be forgotten); `users/<token>`, which a process that lives keeps locked, with a line for each use
that begins (`+name`) or ends (`-name`); `lock`, which is held by all who begin a use, or by the one who removes.

Where a file system has no flock, nothing is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.errors import ConfigError, first_line

log = logging.getLogger(__name__)

LIMIT = "REFSCORE_CACHE_GIB"
_DEFAULT_GIB = 32.0

# what stays when something must go: else every new file would make another one go
_KEPT = 0.9
_DAY = 24 * 3600
# of a process's notes, before they are written anew without the uses that have ended
_LINES = 10_000


def cache_limit() -> int:
    """Bytes to which each cache is bounded. Raises ConfigError if the environment does not say a number."""
    said = os.environ.get(LIMIT) or _DEFAULT_GIB
    with suppress(ValueError, OverflowError):
        limit = int(float(said) * 2**30)
        if limit >= 0:
            return limit
    raise ConfigError(
        f"{LIMIT} is {said!r} in the environment: give the GiB to which each cache is bounded, 50 for instance"
    )


class Shelf:
    """The files in `directory`: at most `limit` bytes (default: `cache_limit`), what is in use apart. Opening creates nothing.

    A shelf belongs to the process that opened it; its threads may share it.
    """

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory = directory
        self._limit = cache_limit() if limit is None else limit
        self._own = directory / ".shelf"
        self._noting = threading.Lock()
        self._notes: int | None = None
        self._held: Counter[str] = Counter()
        self._lines = 0
        # bytes that may still be put before this process looks at the directory again
        self._room = 0

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    @contextmanager
    def using(self, name: str) -> Iterator[Path | None]:
        """The file's path, which stays until the block is left; None if there is no such file."""
        path = self.directory / name
        noted = False
        # without the right to write here the file is used without a note
        with self._locked(fcntl.LOCK_SH), suppress(OSError):
            if path.is_file():
                self._note("+", name)
                noted = True
                self._touch(name)
        try:
            yield path if path.is_file() else None
        finally:
            if noted:
                with suppress(OSError):
                    self._note("-", name)

    @contextmanager
    def making(self, name: str, write: Callable[[Path], None]) -> Iterator[Path]:
        """Like `using`, of a file that is made if it is not there; see `put`."""
        while True:
            with self.using(name) as path:
                if path is not None:
                    yield path
                    return
            self.put(name, write)

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` make the file at a temporary path and give it its name; a file of that name is replaced.

        Makes room, if need be. Raises what `write` raises, and RefscoreError if the disk is full or refuses; then nothing is left.
        """
        path = self.directory / name
        with durable.replacing(path) as temporary:
            write(temporary)
            size = temporary.stat().st_size
        with suppress(OSError):
            self._touch(name)
        self._room -= size
        if self._room < 0:
            self._make_room(name)

    def _make_room(self, newest: str) -> None:
        with self._locked(fcntl.LOCK_EX) as locked:
            if not locked:
                log.debug("%s cannot be locked: nothing is removed", self.directory)
                return
            files = self._files()
            total = sum(size for _, size, _ in files)
            if total > self._limit:
                in_use = {newest, *self._in_use()}
                for _, size, name in sorted(files):
                    if total > _KEPT * self._limit and name not in in_use:
                        with suppress(OSError):
                            (self.directory / name).unlink(missing_ok=True)
                            total -= size
                self._sweep()
            # others put files too: so not all of what is left
            self._room = max(0, self._limit - total) // 8

    def _sweep(self) -> None:
        """Remove what removed files and killed writers left."""
        gone = [used for used in (self._own / "used").glob("*") if not (self.directory / used.name).exists()]
        for leftover in [*gone, *self.directory.glob(f"{durable.TEMPORARY}*")]:
            with suppress(OSError):
                if leftover in gone or time.time() - leftover.stat().st_mtime > _DAY:
                    leftover.unlink()

    def _files(self) -> list[tuple[float, int, str]]:
        """Last use, size and name of every file."""
        files = []
        with suppress(FileNotFoundError), os.scandir(self.directory) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if not entry.name.startswith(".") and entry.is_file():
                        status = entry.stat()
                        files.append((max(status.st_mtime, self._last_use(entry.name)), status.st_size, entry.name))
        return files

    def _last_use(self, name: str) -> float:
        try:
            return (self._own / "used" / name).stat().st_mtime
        except OSError:
            return 0.0

    def _touch(self, name: str) -> None:
        used = self._own / "used" / name
        used.parent.mkdir(parents=True, exist_ok=True)
        used.touch()

    def _in_use(self) -> set[str]:
        """Names that processes use which live; what others left is removed."""
        uses: Counter[str] = Counter()
        for path in (self._own / "users").glob("*"):
            with suppress(FileNotFoundError), path.open("r+b") as notes:
                try:
                    fcntl.flock(notes, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except OSError:  # locked: its process lives
                    for line in notes.read().decode().splitlines():
                        uses[line[1:]] += 1 if line.startswith("+") else -1
        return set(+uses)

    def _note(self, sign: str, name: str) -> None:
        with self._noting:
            if self._notes is None:
                self._notes = self._begin()
            self._held[name] += 1 if sign == "+" else -1
            lines = f"{sign}{name}\n"
            # whoever begins a use holds the lock: nobody reads meanwhile
            if sign == "+" and self._lines > _LINES:
                self._held = +self._held
                os.ftruncate(self._notes, 0)
                self._lines, lines = 0, "".join(f"+{held}\n" for held in self._held.elements())
            self._lines += 1
            os.write(self._notes, lines.encode())

    def _begin(self) -> int:
        """Open and lock this process's notes, which go with this object."""
        path = self._own / "users" / f"{os.getpid()}-{secrets.token_hex(4)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with suppress(OSError):
            fcntl.flock(notes, fcntl.LOCK_EX)
        weakref.finalize(self, _end, notes, path, os.getpid())
        return notes

    @contextmanager
    def _locked(self, kind: int) -> Iterator[bool]:
        """Hold the shelf's lock, if it can be had; whether it is held."""
        try:
            if not self.directory.is_dir():
                raise FileNotFoundError(self.directory)
            self._own.mkdir(exist_ok=True)
            lock = os.open(self._own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(lock, kind)
                held = True
            except OSError as error:
                log.debug("%s has no locks (%s)", self.directory, first_line(error))
                held = False
            yield held
        finally:
            os.close(lock)


def _end(notes: int, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not in a fork, whose parent still uses its files
        path.unlink(missing_ok=True)
        os.close(notes)
