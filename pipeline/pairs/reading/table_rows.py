"""Rows of tables: CSV and TSV with a line of names, and Parquet. A line or a file that is broken is an error with its place."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.errors import DataError, first_line
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.reading.misnamed import not_utf8
from pipeline.pairs.reading.remote import File

_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|content|from|value|type)"\s*:')
_BATCH = 1024


def csv_rows(content: BinaryIO, path: File, delimiter: str = ",") -> Iterator[Row]:
    """A row for each record after the line of names; a cell that holds messages as JSON is read as messages."""
    # a field may be as long as a response
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = _names(cells, path, delimiter)
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields, and the first line names {len(names)}: put a field "
                    f"that holds {_NAMED[delimiter]} or a line break between double quotes"
                )
            yield {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: broken quotes ({error}): a field in double quotes doubles those inside it"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}, near line {reader.line_num + 1}: {not_utf8(path)}") from None
    finally:
        # the file is closed by whoever opened it
        text.detach()


def parquet_rows(path: File, place: File, groups: range | None = None) -> Iterator[Row]:
    """Every row of a file, or of some of its row groups; messages call it `place`. Raises DataError if fewer come than it says that
    it holds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise DataError(f"{place}: the column {twice!r} stands twice, and one of them would be lost")
            # asked for all row groups at once, pyarrow keeps the bytes of those it has read
            groups = range(file.num_row_groups) if groups is None else groups
            batches = (batch for group in groups for batch in file.iter_batches(_BATCH, [group]))
            for batch in batches:
                rows += len(batch)
                yield from batch.to_pylist()
            promised = sum(file.metadata.row_group(group).num_rows for group in groups)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{place} cannot be read as Parquet ({first_line(error)})") from None
    if rows != promised:
        raise DataError(f"{place} gave {rows} rows and says that it holds {promised}: write it again")


_NAMED = {",": "a comma", "\t": "a tab"}


def _names(cells: list[str], path: File, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    other = next((sign for sign in (";", "\t", "|", ",") if sign != delimiter and sign in names[0]), None)
    if len(names) == 1 and other:
        raise DataError(
            f"{path}: its fields seem to be separated by {other!r}, and {delimiter!r} is read: "
            + ("name it .tsv" if other == "\t" else "write it with commas, or as JSONL")
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the first line must name every column once, and {twice[0][:40]!r} stands twice")
    return names


def _cell(name: str, cell: str) -> Any:
    if name.endswith("_cut_off"):
        return {"true": True, "false": False, "": None}.get(cell.strip().lower(), cell)
    if _MESSAGES.match(cell):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell
