"""sha256 of JSON values and of files. Digests of files are remembered, in one SQLite file, while nothing says that the file
changed, so that big weights are read once and not every run.

A file is known again by path, device, inode, size and the times of its last change, of which one cannot be set by hand. Times
that could hide a change are not trusted: the epoch of reproducible images, the future, and the moment of the reading itself.
Two read-only images mounted in turn at one path agree in all of these, so files on them are known by the very mount too, or
not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import first_line

log = logging.getLogger(__name__)

_BLOCK = 8 * 2**20
MEMORY = Path("data/cache/digests.sqlite")

# what nobody asked for in so many days is forgotten: most of it is of files that are gone
_DAYS = 90
# seconds for which another process that writes is waited for
_PATIENCE = 10.0
_TABLE = "CREATE TABLE IF NOT EXISTS digests (stamp TEXT PRIMARY KEY, digest TEXT NOT NULL, day INTEGER NOT NULL)"
_INDEX = "CREATE INDEX IF NOT EXISTS digests_by_day ON digests (day)"
_ASKED = "stamp IN (SELECT value FROM json_each(?))"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
# seconds since 1970: what is older was never a time, but stands for one
_NO_TIME = 10 * 365 * 24 * 3600
# nanoseconds in which a file may change again without another time: file systems whose times are whole seconds need more
_TICK, _COARSE_TICK = 50_000_000, 2_000_000_000
_STATX_MNT_ID_UNIQUE = 0x4000
_AT_FDCWD = -100


def json_sha256(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON: sorted names, no spaces, ASCII alone."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of the file's bytes; read again whenever it may have changed since they were."""
    return files_sha256([path])[path]


def unread_bytes(paths: list[Path]) -> int:
    """Bytes that `files_sha256` would have to read."""
    stamps = {path: file_stamp(path) for path in paths}
    remembered = _remembered(stamps.values())
    return sum(path.stat().st_size for path, stamp in stamps.items() if stamp not in remembered)


def files_sha256(paths: list[Path], on_bytes: Callable[[int], None] = lambda _: None) -> dict[Path, str]:
    """Like `file_sha256` for many files, read in parallel; `on_bytes` hears of every block that was read."""
    stamps = {path: file_stamp(path) for path in paths}
    remembered = _remembered(stamps.values())
    digests = {path: remembered[stamp] for path, stamp in stamps.items() if stamp is not None and stamp in remembered}
    missing = [path for path in paths if path not in digests]
    if missing:
        with ThreadPoolExecutor() as pool:
            fresh = dict(zip(missing, pool.map(lambda path: _sha256(path, on_bytes), missing), strict=True))
        digests |= fresh
        _remember(
            {stamp: fresh[path] for path in missing if (stamp := unchanged_stamp(path, stamps[path])) is not None}
        )
    return digests


def file_stamp(path: Path) -> str | None:
    """What a file is known by while it does not change; None if its times, or where it lies, can hide a change."""
    status = path.stat()
    now = time.time_ns()
    for changed in (status.st_mtime_ns, status.st_ctime_ns):
        tick = _TICK if changed % 1_000_000_000 else _COARSE_TICK
        if changed < _NO_TIME * 1_000_000_000 or changed + tick > now:
            return None
    parts: list[object] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        mount = _mount_of(path)
        if mount is None:
            return None
        parts.append(mount)
    # names of files may be bytes that are no text
    return "|".join(map(str, [path.resolve(), *parts])).encode("utf-8", "backslashreplace").decode()


def unchanged_stamp(path: Path, before: str | None) -> str | None:
    """`before` if the file, which was read since, still has that stamp; else None."""
    try:
        return before if before is not None and file_stamp(path) == before else None
    except OSError:
        return None


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            on_bytes(len(block))
    return state.hexdigest()


def _mount_of(path: Path) -> str | None:
    """A name of the mount that the file lies on, never used again; None if the kernel (before 6.8) tells none.

    From `man 2 statx`: stx_mask is the first of its 256 bytes, stx_mnt_id stands at byte 144.
    """
    answer = ctypes.create_string_buffer(256)
    try:
        failed = ctypes.CDLL(None).statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_MNT_ID_UNIQUE, answer)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (AttributeError, OSError):
        return None
    if failed or not int.from_bytes(answer.raw[:4], "little") & _STATX_MNT_ID_UNIQUE:
        return None
    return f"{boot}.{int.from_bytes(answer.raw[144:152], 'little')}"


def _remembered(stamps: Iterable[str | None]) -> dict[str, str]:
    """Those of the stamps that are remembered, with their digests: one question, however many they are."""
    asked = json.dumps([stamp for stamp in stamps if stamp is not None])
    remembered: dict[str, str] = {}
    if MEMORY.is_file():
        with _only_a_memory(), _memory() as memory:
            rows = memory.execute(f"SELECT stamp, digest, day FROM digests WHERE {_ASKED}", [asked]).fetchall()  # noqa: S608
            remembered = {stamp: digest for stamp, digest, _ in rows}
            if any(day < _today() for _, _, day in rows):
                memory.execute(f"UPDATE digests SET day = ? WHERE {_ASKED}", [_today(), asked])  # noqa: S608
    return remembered


def _remember(entries: dict[str, str]) -> None:
    if not entries:
        return
    with contextlib.suppress(OSError):
        MEMORY.parent.mkdir(parents=True, exist_ok=True)
    with _only_a_memory(), _memory() as memory:
        rows = [(stamp, digest, _today()) for stamp, digest in entries.items()]
        memory.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
        memory.execute("DELETE FROM digests WHERE day < ?", [_today() - _DAYS])


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    """The database, in one transaction."""
    with contextlib.closing(sqlite3.connect(MEMORY, timeout=_PATIENCE)) as memory, memory:
        memory.execute(_TABLE)
        memory.execute(_INDEX)
        yield memory


@contextlib.contextmanager
def _only_a_memory() -> Iterator[None]:
    """Pass over whatever goes wrong with the database: it costs time, not correctness. A damaged one is removed."""
    try:
        yield
    except sqlite3.Error as error:
        log.debug("%s: %s", MEMORY, first_line(error))
        # the low byte of an extended code is the code
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            log.debug("%s is damaged: it is begun anew", MEMORY)
            with contextlib.suppress(OSError):
                # a journal that is left would be played back into the next
                MEMORY.with_name(f"{MEMORY.name}-journal").unlink(missing_ok=True)
                MEMORY.unlink()


def _today() -> int:
    return int(time.time() // (24 * 3600))
