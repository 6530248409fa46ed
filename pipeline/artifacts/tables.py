"""How the tables that pass between stages are written and read.

Tables are written with pyarrow (zstd, floats byte-stream-split, page checksums) and durably; reading checks the schema
and refuses a file that does not fit, it never infers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import FORMAT, FORMAT_KEY, SPLIT
from pipeline.errors import DataError

# rows that are written, and read, together
_AT_ONCE = 8192


def write_table(path: Path, table: pa.Table, about: dict[str, Any] | None = None) -> None:
    """Write `table` durably; `about` is kept as JSON in the file's metadata under `refscore`."""
    with durable.replacing(path) as temporary:
        write_parquet(temporary, table, about)


def write_parquet(path: Path, table: pa.Table, about: dict[str, Any] | None = None) -> None:
    """Write `table` in this project's encoding, without any protocol around it."""
    with parquet_writer(path, table.schema, about) as writer:
        writer.write_table(table, row_group_size=_AT_ONCE)


def row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of tables of one schema, in order, in parts that are written as one row group each."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= _AT_ONCE:
            joined = pa.concat_tables(waiting)
            whole = rows - rows % _AT_ONCE
            yield from (joined.slice(start, _AT_ONCE).combine_chunks() for start in range(0, whole, _AT_ONCE))
            waiting, rows = [joined.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(waiting).combine_chunks()


def parquet_writer(path: Path, schema: pa.Schema, about: dict[str, Any] | None = None) -> pq.ParquetWriter:
    """Writes tables of `schema` one after the other in this project's encoding, without any protocol around it."""
    metadata = {**(schema.metadata or {}), FORMAT_KEY: str(format_of(schema) or FORMAT).encode()}
    if about is not None:
        metadata[b"refscore"] = json.dumps(about, sort_keys=True).encode()
    schema = schema.with_metadata(metadata)
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=3,
        use_dictionary=[name for name, kind in _leaves(schema) if pa.types.is_string(kind)],
        use_byte_stream_split=[
            name
            for name, kind in _leaves(schema)
            if pa.types.is_floating(kind) or SPLIT in (schema.field(name.partition(".")[0]).metadata or {})
        ],
        write_page_checksum=True,
    )


def format_of(schema: pa.Schema) -> int | None:
    """The format that a table was written in, or is to be written in; None if what it says is no number."""
    try:
        return int((schema.metadata or {}).get(FORMAT_KEY, FORMAT))
    except ValueError:
        return None


def in_format_of(path: Path, schema: pa.Schema) -> bool:
    """Whether the file at `path` has the format in which `schema` is written now."""
    try:
        return format_of(pq.read_schema(path)) == format_of(schema)
    except (pa.ArrowException, OSError):
        return False


def arrays_of(table: pa.Table, column: str) -> list[np.ndarray]:
    """The lists of a column as arrays of their own type, in order; no value is copied."""
    return [
        np.empty(0, row.type.value_type.to_pandas_dtype())
        if row.values is None
        else row.values.to_numpy(zero_copy_only=False)
        for row in table[column]
    ]


def list_column(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A column of `kind`, a list type: one array per row."""
    dtype = kind.value_type.to_pandas_dtype()
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind)


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read `path`, which must hold exactly `schema`'s columns and types; `columns` reads a part.

    Columns that are marked as added later are null if the file lacks them. Raises DataError if the file is missing, damaged,
    of another schema, or written by a newer version in a format of its own.
    """
    try:
        later = _lacking(path, pq.read_schema(path), schema)
        there = None if columns is None else [name for name in columns if name not in {field.name for field in later}]
        table = pq.read_table(path, columns=there, page_checksum_verification=True)
        return _with_nulls(table, later if columns is None else [field for field in later if field.name in columns])
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: run the stage that writes it first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): make it again") from None


def read_groups(path: Path, schema: pa.Schema, columns: list[str]) -> Iterator[pa.Table]:
    """Some columns of `path` part by part, in order, so that memory does not grow with rows.

    Raises DataError as `read_table` does.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            later = [field for field in _lacking(path, file.schema_arrow, schema) if field.name in columns]
            there = [name for name in columns if name not in {field.name for field in later}]
            # asked for all row groups at once, pyarrow keeps the bytes of those it has read
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=_AT_ONCE, columns=there, row_groups=[group]):
                    yield _with_nulls(pa.Table.from_batches([batch]), later)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: run the stage that writes it first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): make it again") from None


def read_about(path: Path) -> dict[str, Any]:
    """The JSON kept in the file's metadata; empty if there is none or no such file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (FileNotFoundError, pa.ArrowException, OSError):
        return {}
    return _about(metadata)


def about_in(schema: pa.Schema) -> dict[str, Any]:
    """The JSON kept in the metadata of a file's schema; empty if there is none, or none that can be read."""
    return _about(schema.metadata or {})


def _about(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get(b"refscore", b"{}"))
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _must_be_known(path: Path, found: pa.Schema, declared: pa.Schema) -> None:
    made_in, known = format_of(found), format_of(declared) or FORMAT
    if made_in is None:
        raise DataError(f"{path} says a format that is no number, so no refscore wrote it: make it again")
    if made_in > known:
        raise DataError(
            f"{path} has format {made_in}, written by a newer refscore; this one reads up to {known}: update refscore, or "
            "make the file again"
        )
    if made_in < known:
        raise DataError(
            f"{path} has format {made_in}, written by an older refscore; this one reads {known}: run 'refscore precompute' "
            "again with the same configuration and run, which scores nothing that is stored"
        )


def _lacking(path: Path, found: pa.Schema, declared: pa.Schema) -> list[pa.Field]:
    """Columns that were added later and that a file of the schema `found` lacks; DataError unless it has all others."""
    _must_be_known(path, found, declared)
    later = [field for field in declared if field.name not in found.names and (field.metadata or {}).get(b"later")]
    for field in later:
        found = found.append(field)
    _must_equal(path, found, declared)
    return later


def _with_nulls(table: pa.Table, fields: Sequence[pa.Field]) -> pa.Table:
    for field in fields:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def _must_equal(path: Path, schema: pa.Schema, declared: pa.Schema) -> None:
    problems = [
        f"{field.name}: expected {field.type}, found {schema.field(field.name).type if field.name in schema.names else 'none'}"
        for field in declared
        if field.name not in schema.names or schema.field(field.name).type != field.type
    ]
    problems += [f"{name}: not a column of this table" for name in schema.names if name not in declared.names]
    if problems:
        raise DataError(f"{path} has another schema ({'; '.join(problems)}): make it again with this version")


def _leaves(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    # Parquet names the leaf of a list column column.list.<element>
    leaves = []
    for field in schema:
        name, kind = field.name, field.type
        while pa.types.is_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        leaves.append((name, kind))
    return leaves
