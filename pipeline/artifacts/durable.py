"""Files that are either whole or absent, also after a crash: write beside, flush, rename, flush the directory."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import RefscoreError

TEMPORARY = ".tmp-"

CACHE = Path("data/cache")


def temporary_beside(path: Path) -> Path:
    """A name in the same directory that no reader looks at."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it takes `path`'s place durably, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with explaining_disk(path):
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` durably."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` durably as indented JSON (no NaN: it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            space = f"about {needed:,} bytes are needed" if needed else "more is needed"
            raise RefscoreError(
                f"no space left to write {path}: {space}. What was published before stays; free some space, or choose "
                "another place, and run the same command again"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise RefscoreError(f"{path} cannot be written ({error.strerror}): choose another place") from None
        raise


def file_name(text: str) -> str:
    """`text` with everything but letters, digits, '.', '_' and '-' replaced by '_'."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in text)


def scratch_place() -> str | None:
    """The directory for working files, data/cache; None, the system's temporary one, if it cannot be written."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(CACHE)
