"""One file of preference data: which reader its name asks for, and its rows. What cannot be read is an error with the file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipeline.errors import DataError, RefscoreError, first_line
from pipeline.pairs.reading.json_rows import Row, json_rows, jsonl_rows, jsonl_rows_between
from pipeline.pairs.reading.misnamed import HEAD, must_be_text
from pipeline.pairs.reading.remote import File, RemoteFile, unreadable
from pipeline.pairs.reading.table_rows import csv_rows, parquet_rows

_TEXTS: dict[str, Callable[[BinaryIO, File], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": partial(csv_rows, delimiter="\t"),
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*_TEXTS, ".parquet")


def suffix_of(path: File | PurePosixPath) -> str | None:
    """The ending that says how a file is read, without that of its compression; None if it is none that is read."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    if suffix in PACKED:
        return inner if inner in _TEXTS else None
    return suffix if suffix in SUFFIXES else None


def file_rows(path: File, place: File | None = None, part: tuple[int, int] | None = None) -> Iterator[Row]:
    """Every row of a file in order, or of a part of it: row groups of Parquet, or bytes of JSONL, from and to.

    Raises DataError, which names `place` if given, for whatever is broken in it.
    """
    suffix, place = suffix_of(path), place or path
    if suffix is None:
        raise DataError(
            f"{place}: files ending in {', '.join(SUFFIXES)} are read, all but Parquet also behind .gz or .zst; "
            f"got {''.join(path.suffixes[-2:]) or 'no ending'!r}"
        )
    try:
        if suffix == ".parquet":
            yield from parquet_rows(path, place, range(*part) if part else None)
            return
        with _opened(path, place) as content:
            if part:
                yield from jsonl_rows_between(content, place, *part)
                return
            yield from _TEXTS[suffix](content, place)
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{place}: its compressed data is broken or cut off ({first_line(error)}): copy it again"
        ) from None
    except OSError as error:
        if path.suffix.lower() in PACKED and not error.errno:
            raise DataError(
                f"{place}: no {PACKED[path.suffix.lower()]} data, or cut off ({first_line(error)}): copy it again, or give it "
                "the ending of what it is"
            ) from None
        raise DataError(f"{place} cannot be read ({error.strerror or first_line(error)})") from None
    except Exception as error:
        if isinstance(error, RefscoreError) or not isinstance(path, RemoteFile):
            raise
        raise unreadable(str(place), error) from None


@contextmanager
def _opened(path: File, place: File) -> Iterator[BinaryIO]:
    """A text file's bytes, decompressed as its name says, checked to be text."""
    packing = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        if packing not in PACKED:
            must_be_text(head, place, unpacked=False)
            yield file
        elif head:
            with unpacked(file, packing) as content:
                must_be_text(content.peek(HEAD)[:HEAD], place, unpacked=True)
                yield content
        else:
            raise DataError(f"{place} is empty, not even compressed data")


def unpacked(file: BinaryIO, packing: str) -> io.BufferedReader:
    """What compressed data holds; `packing` is the ending of its name."""
    if packing == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
