"""Files that are either whole or absent, also after a crash: write beside, flush, rename, flush the directory."""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import RefscoreError

TEMPORARY = ".tmp-"

CACHE = Path("data/cache")

# numbers of the system's errors: nothing more fits; this may not be done
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# what a file system answers that has no hard links, or has them not here
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EINVAL)

_WORKED_IN: set[Path] = set()


def temporary_beside(path: Path) -> Path:
    """A name in the same directory that no reader looks at."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def temporary_directory(path: Path) -> Path:
    """Make a directory beside `path`, to be renamed to it. RefscoreError if the disk is full or the place cannot be written."""
    directory = temporary_beside(path)
    with explaining_disk(path):
        directory.mkdir(parents=True)
    return directory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it takes `path`'s place durably, else it is removed."""
    temporary = temporary_beside(path)
    try:
        with explaining_disk(path):
            make_directory(path.parent)
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_directory(directory: Path) -> None:
    """Make the directory and those above it, if they are not there. Raises RefscoreError if it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (*FULL, *REFUSED):
            raise
        raise RefscoreError(f"{directory} cannot be made ({error.strerror}): choose another place") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` durably."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` durably as indented JSON (no NaN: it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def link_new(file: Path, path: Path) -> bool:
    """Give a finished file a second name that nothing may stand under yet; whether nothing did.

    Without hard links it is copied: who looks meanwhile may find a part of it.
    """
    try:
        os.link(file, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            with path.open("xb") as copy:
                copy.write(file.read_bytes())
        except FileExistsError:
            return False
    return True


def flush(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reached(point: str) -> None:
    """A named moment of a protocol. It does nothing: the fault tests put themselves here, to die at just that moment."""


@contextmanager
def explaining_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk, a read-only directory or missing rights into a message with the path and the bytes `needed`."""
    try:
        yield
    except RefscoreError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in FULL:
            space = f"about {needed:,} bytes are needed" if needed else "more is needed"
            raise RefscoreError(
                f"no space left to write {path}: {space}. What was published before stays; free some space, or choose "
                "another place, and run the same command again"
            ) from None
        if number in REFUSED and _concerns(error, path):
            raise RefscoreError(f"{path} cannot be written ({os.strerror(number)}): choose another place") from None
        raise


def _concerns(error: BaseException, path: Path) -> bool:
    """Whether it was `path`, or something beside or below it, that was refused, and not a file that was read meanwhile."""
    named = getattr(error, "filename", None)
    return named is None or Path(os.fsdecode(named)).absolute().is_relative_to(path.absolute().parent)


def error_number(error: BaseException) -> int:
    """The system's number of what went wrong; libraries written in Rust say it in words alone. 0: it was something else."""
    if isinstance(error, OSError):
        return error.errno or 0
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else 0


def file_name(text: str) -> str:
    """`text` with everything but letters, digits, '.', '_' and '-' replaced by '_'."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in text)


def scratch_place() -> str | None:
    """This process's directory for working files, below data/cache; None, the system's temporary one, if it cannot be made.

    It goes when the process ends; what killed ones left is removed by the next.
    """
    here = CACHE.absolute() / "work" / f"{os.getpid()}-{machine()}"
    if here in _WORKED_IN and here.is_dir():  # somebody may have removed data/ meanwhile
        return str(here)
    # of a process that was killed, and had the same number
    shutil.rmtree(here, ignore_errors=True)
    try:
        here.mkdir(parents=True)
    except OSError:
        return None
    _WORKED_IN.add(here)
    atexit.register(_clear, here, os.getpid())
    for other in here.parent.iterdir():
        pid, _, its_machine = other.name.partition("-")
        # what another machine works on cannot be told from what it left
        if its_machine == machine() and pid.isdigit() and not lives(int(pid)):
            shutil.rmtree(other, ignore_errors=True)
    return str(here)


def lives(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _clear(place: Path, pid: int) -> None:
    if os.getpid() == pid:  # and not in a fork, which would do this too
        shutil.rmtree(place, ignore_errors=True)


def machine() -> str:
    """A name of this machine, and of the namespace in which pids mean what they mean here."""
    with suppress(OSError):
        return hashlib.sha256(f"{platform.node()} {Path('/proc/self/ns/pid').readlink()}".encode()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
