"""sha256 of files, remembered by path, size, mtime and inode, so that big weights are read once and not every run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import durable
from pipeline.errors import RefscoreError

_BLOCK = 8 * 2**20
MEMORY = Path("data/cache/digests.json")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of the file's bytes; read again whenever size, mtime or inode differ from the remembered ones."""
    return files_sha256([path])[path]


def unread_bytes(paths: list[Path]) -> int:
    """Bytes that `files_sha256` would have to read."""
    remembered = _remembered()
    return sum(path.stat().st_size for path in paths if _stamp(path) not in remembered)


def files_sha256(paths: list[Path], on_bytes: Callable[[int], None] = lambda _: None) -> dict[Path, str]:
    """Like `file_sha256` for many files, read in parallel; `on_bytes` hears of every block that was read."""
    remembered = _remembered()
    stamps = {path: _stamp(path) for path in paths}
    known = {path: remembered[stamp] for path, stamp in stamps.items() if stamp in remembered}
    missing = [path for path in paths if path not in known]
    if missing:
        with ThreadPoolExecutor() as pool:
            fresh = dict(zip(missing, pool.map(lambda path: _sha256(path, on_bytes), missing), strict=True))
        known |= fresh
        _remember({stamps[path]: digest for path, digest in fresh.items()})
    return known


def _sha256(path: Path, on_bytes: Callable[[int], None]) -> str:
    state = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            state.update(block)
            on_bytes(len(block))
    return state.hexdigest()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def _remembered() -> dict[str, str]:
    try:
        content = json.loads(MEMORY.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(entries: dict[str, str]) -> None:
    # only a memory: a place that cannot be written costs time, not correctness
    with contextlib.suppress(RefscoreError, OSError):
        merged = {**_remembered(), **entries}
        durable.write_json(MEMORY, dict(list(merged.items())[-10_000:]))
