"""A run's Parquet files read by pages: a few columns whole, or all of a few rows, and anew when a stage replaced the file.

Row groups hold a few thousand rows, so that a page of a hundred is there in milliseconds, whatever the file holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.tables import read_table
from pipeline.errors import DataError, first_line

# of the columns that pages ask for by rows
_MAY_BE_EMPTY = {"topic", "source", "source_row", "score", "words", "logps", "ref_logps"} | {
    f"ref_{side}_token_logps" for side in ("chosen", "rejected")
}
# which file it was: bytes, time of change in nanoseconds, number on its disk; None: there is none
Stamp = tuple[int, int, int] | None


def stamp(path: Path) -> Stamp:
    """What tells one version of a file from the next, since stages replace files whole."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # the latter of a name that cannot be a file's
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> pl.DataFrame:
    """Whole columns of a file, and each row's place in it as `row`. Raises DataError as `read_table` does."""
    frame = pl.DataFrame(read_table(path, schema, list(names)))
    return frame.with_row_index("row")


def rows(path: Path, schema: pa.Schema, places: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows at `places`, in the order asked for; only the row groups that hold them are read.

    A column that was added later and that the file lacks is None. Raises DataError if the file is gone, cannot be read, or lacks a
    value that every row has.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            there = [name for name in names if name in file.schema_arrow.names]
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            version = stamp(path)
            found: dict[int, dict[str, Any]] = {}
            for group, first in enumerate(starts[:-1]):
                inside = [place for place in dict.fromkeys(places) if first <= place < starts[group + 1]]
                if inside:
                    table = _group(path, version, group, tuple(there))
                    taken = table.take(pa.array([place - first for place in inside])).to_pylist()
                    found |= dict(zip(inside, taken, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)}): make it again") from None
    absent: dict[str, Any] = {name: None for name in names if name in schema.names}
    if len(found) < len(set(places)):
        raise DataError(f"{path} was replaced meanwhile: load the page again")
    for place, row in found.items():
        if empty := [name for name, value in row.items() if value is None and name not in _MAY_BE_EMPTY]:
            raise DataError(f"{path} has no {empty[0]} in row {place}, which no refscore wrote: make it again")
    return [absent | found[place] for place in places]


# pages that follow each other lie in the same row groups
@lru_cache(maxsize=8)
def _group(path: Path, _version: Stamp, group: int, names: tuple[str, ...]) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read_row_group(group, columns=list(names))
