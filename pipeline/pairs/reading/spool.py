"""Rows from a pipe: copied to a temporary file once, as sources are digested and read more than once."""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path

from pipeline.artifacts.durable import scratch_place
from pipeline.errors import DataError, first_line
from pipeline.pairs.reading.files import unpacked
from pipeline.pairs.reading.misnamed import HEAD

STDIN = "-"
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


def spooled(place: str) -> Path:
    """The copy of what a pipe, or for "-" standard input, holds, with the ending of what it is; it goes with the process.

    Raises DataError if nothing comes, or if a person would have to type it.
    """
    return _copied(place)[1]


def is_spooled(place: str) -> bool:
    """Whether a source can be read but once: standard input or a pipe."""
    return place == STDIN or Path(place).is_fifo() or place in ("/dev/stdin", "/dev/fd/0")


@cache
def _copied(place: str) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    name = "standard input" if place == STDIN else place
    if place == STDIN and os.isatty(0):
        raise DataError("data.path is '-', standard input, and that is the terminal: pipe the rows in, or name a file")
    directory = tempfile.TemporaryDirectory(prefix="stdin-", dir=scratch_place())
    copy = Path(directory.name) / "rows"
    try:
        with open(0 if place == STDIN else place, "rb", closefd=place != STDIN) as given, copy.open("wb") as kept:
            while piece := given.read(1 << 20):
                kept.write(piece)
    except OSError as error:
        raise DataError(f"{name} cannot be read or kept in {directory.name} ({error.strerror})") from None
    if not copy.stat().st_size:
        raise DataError(
            f"{name} holds no rows. It can be read once: where an earlier command or stage has read it, save the rows as a file "
            "and give data.path its name"
        )
    return directory, copy.rename(copy.with_name("rows" + _ending(copy, name)))


def _ending(path: Path, name: str) -> str:
    """The ending that a file of this content would have."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
            file.seek(0)
            packing = next((ending for magic, ending in _MAGIC.items() if head.startswith(magic)), "")
            if packing:
                head = unpacked(file, packing).peek(HEAD)
    except (OSError, EOFError) as error:
        raise DataError(f"{name}: its compressed data is broken ({first_line(error)})") from None
    if head.startswith(b"PAR1"):
        return ".parquet"
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().splitlines()[:1]
    if not line or line[0][:1] in (b"{", b"\xff", b"\xfe", b"\0"):
        return (".jsonl" if not line or _is_json(line[0]) else ".json") + packing
    if line[0][:1] == b"[":
        return ".json" + packing
    return (".tsv" if b"\t" in line[0] else ".csv") + packing


def _is_json(line: bytes) -> bool:
    """Whether an object ends on its first line, or is longer than what was looked at."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return len(line) > 1
    return True
