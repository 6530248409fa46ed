"""One run, one writer: who writes a run now, since when, and what killed writers left behind. Readers lock nothing.

What is relied on. The lock is flock(2) on a file in the run's directory: the kernel drops it however the process ends. It
holds on local disks and, through the server, on NFS and on Lustre mounted with `flock`. Where a file system refuses flock, or
keeps it to one machine (NFS with local_lock, Lustre with localflock), the record in that file decides: a process of this very
machine (same boot, same namespace of pids) lives if its pid began when the record says; one elsewhere is waited for, and lives
if it touches the file within `_SIGN_OF_LIFE` seconds, which are counted by the file server's clock.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import inspect
import json
import logging
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json
from pipeline.errors import RefscoreError

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

LOCK = ".writer"
_TOUCH_SECONDS, _SIGN_OF_LIFE = 30.0, 150.0
# flock is not there: the record alone decides
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# a lock may be held for a moment by one who finds that it is not free
_TRIES, _BETWEEN_TRIES = 5, 0.2

_HELD: dict[Path, int] = {}
_DESCRIPTORS: set[int] = set()


@dataclass(frozen=True)
class Writer:
    """A process that writes a run: where, which, what it was asked for, and since when (ISO 8601)."""

    host: str
    pid: int
    command: str
    since: str
    machine: str
    began: str
    token: str

    def described(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host} since {self.since.replace('T', ' ')[:19]} UTC ({self.command})"


@contextmanager
def writing(run: Run, command: str = "refscore in Python") -> Iterator[None]:
    """Be the run's only writer within the block; a block inside it, of the same thread, changes nothing.

    Temporary files of killed writers are removed. Raises RefscoreError if another process, or thread, writes the run.
    """
    path = run.directory.absolute() / LOCK
    if path in _HELD:
        if _HELD[path] != threading.get_ident():
            raise RefscoreError(f"run {run.name!r} is being written by another thread of this process: wait for it")
        yield
        return
    with durable.explaining_disk(run.directory):
        descriptor, writer = _take(run, path, command)
    _HELD[path] = threading.get_ident()
    _DESCRIPTORS.add(descriptor)
    over = threading.Event()
    touching = threading.Thread(target=_touch, args=(descriptor, over), daemon=True)
    touching.start()
    try:
        sweep(run.directory)
        yield
    finally:
        over.set()
        touching.join()  # before its descriptor is another file's
        _HELD.pop(path)
        _DESCRIPTORS.discard(descriptor)
        # while it is still locked: who waits for this very file sees that its name is gone, and takes a new one
        if read_json(path).get("token") == writer.token:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            run.directory.rmdir()  # if nothing was written


def one_writer(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function write the run that it takes as `run` alone."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with writing(signature.bind(*args, **kwargs).arguments["run"]):
            return function(*args, **kwargs)

    return alone


def writer_of(run: Run) -> Writer | None:
    """Who writes the run now; None if nobody does. It reads, and locks nothing."""
    path = run.directory / LOCK
    writer = _read(path)
    if writer is None:
        return None
    with suppress(OSError):
        lives = _is_here(writer) if writer.machine == _machine() else time.time() - path.stat().st_mtime < _SIGN_OF_LIFE
        return writer if lives else None
    return None


def has_ended(writer: Writer) -> bool | None:
    """Whether the process of a record has ended; None if it is one of another machine."""
    return not _is_here(writer) if writer.machine == _machine() else None


def sweep(directory: Path) -> list[Path]:
    """Remove the temporary files and directories below `directory` of processes that are gone; returns what was removed."""
    swept = leftovers(directory)
    for path in swept:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return swept


def leftovers(directory: Path, *, within: bool = True) -> list[Path]:
    """Temporary files and directories in `directory`, and `within` its own, of processes that are gone."""
    pattern = f"{durable.TEMPORARY}*"
    found = sorted(directory.rglob(pattern) if within else directory.glob(pattern))
    gone = [path for path in found if not _writes(path.name)]
    # what lies in one that goes goes with it
    return [path for path in gone if not any(parent in gone for parent in path.parents)]


def _writes(name: str) -> bool:
    """Whether the process that a temporary name holds may still be at work. This one is not: it has just begun with the run."""
    pid = name.removeprefix(durable.TEMPORARY).partition("-")[0]
    return pid.isdigit() and int(pid) != os.getpid() and _began(int(pid)) is not None


def _take(run: Run, path: Path, command: str) -> tuple[int, Writer]:
    """An open, locked descriptor of `path` with our record in it."""
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # `refscore rm` was quicker
        try:
            locked = _flock(descriptor)
            if locked is not False and _is_named(descriptor, path):
                other = _read(path)
                if other is None or not _may_write(run, other, path, locked=locked is True):
                    writer = this_process(command)
                    _write(descriptor, writer)
                    if locked or _kept(path, writer):
                        return descriptor, writer
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_BETWEEN_TRIES)
    raise _refusal(run, _read(path))


def _refusal(run: Run, writer: Writer | None) -> RefscoreError:
    by = writer.described() if writer else "another process"
    return RefscoreError(
        f"run {run.name!r} is being written by {by}: wait for it or stop it, or give this one a name of its own (--run NAME)"
    )


def _flock(descriptor: int) -> bool | None:
    """True: locked; False: another holds it; None: this file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the file that was opened: its last holder, or `refscore rm`, may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write(descriptor: int, writer: Writer) -> None:
    content = (json.dumps(asdict(writer)) + "\n").encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)


def _kept(path: Path, writer: Writer) -> bool:
    """Without flock: whether our record is still there after a moment in which another may have written its own."""
    time.sleep(_BETWEEN_TRIES)
    now = _read(path)
    return now is not None and now.token == writer.token


def _read(path: Path) -> Writer | None:
    try:
        return Writer(**read_json(path))
    except TypeError:
        return None


def this_process(command: str) -> Writer:
    """The record of this process."""
    pid = os.getpid()
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Writer(platform.node(), pid, command, since, _machine(), _began(pid) or "", secrets.token_hex(8))


def _may_write(run: Run, other: Writer, path: Path, *, locked: bool) -> bool:
    """Whether the process of a record may still be at work; `locked`: its lock was free, so it is not on this machine.

    Raises RefscoreError if one elsewhere shows that it is.
    """
    if other.machine == _machine():
        return not locked and _is_here(other)
    seen = path.stat().st_mtime
    if _now_at(path.parent) - seen < _SIGN_OF_LIFE:
        log.info("run %r: waiting for a sign of life of %s", run.name, other.described())
    while _now_at(path.parent) - seen < _SIGN_OF_LIFE:
        time.sleep(_BETWEEN_TRIES)
        if path.stat().st_mtime != seen:
            raise _refusal(run, other)
    return False


def _is_here(writer: Writer) -> bool:
    """Whether the process of a record of this machine runs."""
    return _began(writer.pid) == writer.began


def _now_at(directory: Path) -> float:
    """The time by the clock that sets the times of files in `directory`; ours if nothing can be written there."""
    probe = durable.temporary_beside(directory / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _machine() -> str:
    """This boot of this machine, and the namespace in which pids mean what they mean here."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _began(pid: int) -> str | None:
    """When the process began, in ticks since boot; None if there is none, or only its remains that nobody asked for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        # a system without /proc does not tell
        return "" if not Path("/proc/self/stat").exists() and durable.lives(pid) else None
    return None if fields[0] in "ZX" else fields[19]


def _touch(descriptor: int, over: threading.Event) -> None:
    """Show every half minute that this process lives."""
    while not over.wait(_TOUCH_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)


def _forget_in_child() -> None:
    """A forked child must not hold its parent's locks after the parent is gone."""
    for descriptor in _DESCRIPTORS:
        with suppress(OSError):
            os.close(descriptor)
    _DESCRIPTORS.clear()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)
