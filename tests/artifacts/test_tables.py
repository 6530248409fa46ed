"""Tables grow: what is older is read with nulls, what is newer is refused by name; lists come back as they were."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import schemas, tables
from pipeline.artifacts.schemas import DROPPED
from pipeline.artifacts.tables import arrays_of, in_format_of, list_column, read_about, read_table, write_table
from pipeline.errors import DataError

LISTS = pa.list_(pa.float32())


def dropped():
    return pa.Table.from_pylist([{"source": "a", "source_row": 1, "reason": "r", "detail": ""}], schema=DROPPED)


def test_a_column_that_was_added_later_is_null_in_older_files(tmp_path):
    path = tmp_path / "dropped.parquet"
    pq.write_table(dropped().drop_columns(["prompt_ids", "chosen_ids", "rejected_ids"]), path)
    assert read_table(path, DROPPED).equals(dropped())
    assert read_table(path, DROPPED, ["source", "chosen_ids"]).to_pylist() == [{"source": "a", "chosen_ids": None}]


def test_parts_are_the_whole_table_in_order_whatever_its_row_groups(tmp_path, monkeypatch):
    path = tmp_path / "dropped.parquet"
    monkeypatch.setattr(tables, "_AT_ONCE", 3)
    rows = [{"source": "a", "source_row": row, "reason": "r", "detail": ""} for row in range(20)]
    write_table(path, pa.Table.from_pylist(rows, schema=DROPPED), {})
    assert pq.ParquetFile(path).num_row_groups == 7
    parts = list(tables.read_groups(path, DROPPED, ["source_row"]))
    assert max(map(len, parts)) == 3
    assert pa.concat_tables(parts)["source_row"].to_pylist() == list(range(20))


def test_a_column_that_was_always_there_must_be(tmp_path):
    path = tmp_path / "dropped.parquet"
    pq.write_table(dropped().drop_columns(["reason"]), path)
    with pytest.raises(DataError, match=r"reason: expected string, found none.*make it again"):
        read_table(path, DROPPED)


def test_a_newer_format_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "dropped.parquet"
    monkeypatch.setattr(tables, "FORMAT", 7)
    write_table(path, dropped(), {"a": 1})
    assert read_table(path, DROPPED).equals(dropped())
    monkeypatch.setattr(tables, "FORMAT", 6)
    with pytest.raises(DataError, match=r"format 7, written by a newer refscore; this one reads up to 6"):
        read_table(path, DROPPED)
    assert read_about(path) == {"a": 1}


def test_an_older_format_is_met_with_what_to_run(tmp_path):
    """Format 1 of pairs.parquet kept lists under the names that hold sums now."""
    path = tmp_path / "pairs.parquet"
    lists, sums = (schemas.PAIRS.field(f"ref_chosen{of}_logps").type for of in ("_token", ""))
    old = pa.schema(
        [field for field in schemas.PAIRS if not field.name.startswith("ref_")]
        + [(f"ref_{side}_logps", lists) for side in ("chosen", "rejected")]
        + [(f"ref_{side}_logp", sums) for side in ("chosen", "rejected")]
    )
    write_table(path, old.empty_table(), {"inputs_digest": "d"})
    assert not in_format_of(path, schemas.PAIRS)
    with pytest.raises(DataError, match=r"format 1, written by an older refscore.*'refscore precompute' again"):
        read_table(path, schemas.PAIRS)
    with pytest.raises(DataError, match="format 1"):
        list(tables.read_groups(path, schemas.PAIRS, ["pair_id"]))
    write_table(path, schemas.PAIRS.empty_table())
    assert in_format_of(path, schemas.PAIRS)
    assert not in_format_of(tmp_path / "none.parquet", schemas.PAIRS)


@pytest.mark.parametrize("said", [b"two", b"", b"1.5", b"\xff"])
def test_a_format_that_is_no_number_is_a_message(tmp_path, said):
    path = tmp_path / "dropped.parquet"
    pq.write_table(dropped().replace_schema_metadata({b"refscore_format": said}), path)
    assert not in_format_of(path, DROPPED)
    with pytest.raises(DataError, match=r"says a format that is no number.*make it again"):
        read_table(path, DROPPED)
    with pytest.raises(DataError, match="no number"):
        list(tables.read_groups(path, DROPPED, ["source"]))


@pytest.mark.parametrize("lists", [[[1.0, -2.0], [], [3.0]], [[]], []])
def test_lists_come_back_as_they_were(lists):
    column = list_column([np.float32(values) for values in lists], LISTS)
    assert column.type == LISTS
    assert column.to_pylist() == lists
    back = arrays_of(pa.table({"x": column}), "x")
    assert [values.tolist() for values in back] == lists
    assert all(values.dtype == np.float32 for values in back)


def test_a_list_that_is_null_is_empty():
    (values,) = arrays_of(pa.table({"x": pa.array([None], pa.list_(pa.int32()))}), "x")
    assert (values.tolist(), values.dtype) == ([], np.int32)
