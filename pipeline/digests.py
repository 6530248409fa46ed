"""sha256 of files, remembered by path, size, mtime and inode, so that big weights are read once and not every run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import durable
from pipeline.errors import RefscoreError

MEMORY = Path("data/cache/digests.json")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of the file's bytes; read again whenever size, mtime or inode differ from the remembered ones."""
    return files_sha256([path])[path]


def files_sha256(paths: list[Path]) -> dict[Path, str]:
    """Like `file_sha256` for many files, read in parallel."""
    remembered = _remembered()
    stamps = {path: _stamp(path) for path in paths}
    known = {path: remembered[stamp] for path, stamp in stamps.items() if stamp in remembered}
    missing = [path for path in paths if path not in known]
    if missing:
        with ThreadPoolExecutor() as pool:
            fresh = dict(zip(missing, pool.map(_sha256, missing), strict=True))
        known |= fresh
        _remember({stamps[path]: digest for path, digest in fresh.items()})
    return known


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
