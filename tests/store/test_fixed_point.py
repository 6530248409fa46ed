"""Logps in fixed point: off by at most 2^-13 nats, in less than half the bytes, with the sums of what was scored."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import ROUNDED_SCORES, SCORES
from pipeline.artifacts.tables import write_parquet
from pipeline.errors import CheckError
from pipeline.store.fixed_point import LOWEST, UNIT, restored, rounded
from pipeline.store.shard import Unsound, check_shard, open_shard, rows_problem, sha256_now, shard_files
from pipeline.store.store import Scored, Store
from pipeline.store.tidying.compaction import compact
from pipeline.store.transfer import copy_rows, copy_shards, described_references
from tests.store.test_store import REFERENCE, keys, scored

ROUNDED = dataclasses.replace(
    REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, dtype="bfloat16", logps="fixed_point")
)
# as a small model's: many near 0, some of many nats; and the ends of what there is
WILD = [-0.0, -1e-30, -UNIT / 2, -UNIT * 0.49999, -UNIT, -17.5, -4095.9999, -4096.00001, -60000.25, LOWEST / 2]


def row(number, length=40):
    random = np.random.default_rng(number)
    return Scored(scored(number).key, 3, (-(random.exponential(1, length) ** 2.2)).astype(np.float32))


ROWS = [row(number) for number in range(20)] + [Scored(b"\1" * 32, 1, np.array(WILD, np.float32))]


@pytest.fixture
def store(tmp_path):
    store = Store([str(tmp_path / "store")], ROUNDED)
    store.publish(ROWS[:9])
    store.publish(ROWS[9:])
    return store


def held(store):
    return {one["key"]: one for one in store.lookup(keys(*ROWS)).found().iter_rows(named=True)}


def test_no_value_is_off_by_more_than_half_a_unit_and_no_sum_at_all(store):
    found = held(store)
    for asked in ROWS:
        values = np.array(found[asked.key]["logps"], np.float32)
        assert np.abs(values.astype(np.float64) - asked.logps).max() <= 2.0**-13
        assert not np.signbit(values[values == 0]).any()
        assert found[asked.key]["logp"] == asked.logps.sum(dtype=np.float64)
    assert any((np.array(found[one.key]["logps"], np.float32) != one.logps).any() for one in ROWS)


def test_a_value_by_hand():
    table = pa.Table.from_pylist(
        [{"key": b"\2" * 32, "prompt_tokens": 1, "response_tokens": 3, "logps": [-1.0, -0.00013, -0.5001], "logp": -1.50023}],
        schema=SCORES,
    )  # fmt: skip
    assert rounded(table)["logps"].to_pylist() == [[4096, 1, 2048]]
    assert restored(rounded(table))["logps"].to_pylist() == [[-1.0, -1 / 4096, -0.5]]
    assert restored(rounded(table))["logp"].to_pylist() == [-1.50023]


@pytest.mark.parametrize("parts", [[9], [3, 6]])
def test_parts_of_tables_are_converted_as_they_are(parts):
    tables = [_table(ROWS[:9]).slice(end - size, size) for size, end in zip(parts, np.cumsum(parts), strict=True)]
    table = pa.concat_tables(tables).slice(2, 4)
    converted = restored(rounded(table))
    assert converted["key"].to_pylist() == table["key"].to_pylist()
    for before, after in zip(table["logps"].to_pylist(), converted["logps"].to_pylist(), strict=True):
        assert np.allclose(before, after, rtol=0, atol=2.0**-13)


def _table(rows):
    return pa.table(
        {
            "key": pa.array([one.key for one in rows], pa.binary(32)),
            "prompt_tokens": [one.prompt_tokens for one in rows],
            "response_tokens": [len(one.logps) for one in rows],
            "logps": [one.logps for one in rows],
            "logp": [float(one.logps.sum(dtype=np.float64)) for one in rows],
        },
        schema=SCORES,
    )


def test_shards_are_sound_and_say_their_form(store):
    shards = shard_files(store.places[0].directory)
    assert [check_shard(shard) for shard in shards] == [None, None]
    with open_shard(shards[0]) as file:
        assert file.rounded
        assert file.schema_arrow.field("logps").type == ROUNDED_SCORES.field("logps").type
        assert file.read().schema.equals(SCORES)
        assert file.read_row_group(0, columns=["key"]).column_names == ["key"]


@pytest.mark.parametrize(
    ("column", "value"), [("logps", [[0] * 40]), ("logps", [[-1] + [4096] * 39]), ("logp", [-1.0])]
)
def test_what_cannot_be_true_is_found(store, tmp_path, column, value):
    table = rounded(_table(ROWS[:1]))
    field = ROUNDED_SCORES.field(column)
    path = tmp_path / "shard.parquet"
    write_parquet(path, table.set_column(table.column_names.index(column), field, pa.array(value, field.type)), {})
    assert "row 0" in check_shard(path.rename(tmp_path / f"scores-{sha256_now(path)}.parquet"))


def test_a_sum_may_be_off_by_what_rounding_makes_and_no_more():
    table = _table(ROWS[:1])
    for by, problem in ((0.9, None), (1.1, "row 0: logp is not the sum of logps")):
        off = pa.array([table["logp"][0].as_py() - by * 40 * 2.0**-13])
        assert rows_problem(table.set_column(4, SCORES.field("logp"), off), rounded=True) == problem
        assert rows_problem(table.set_column(4, SCORES.field("logp"), off)) is not None


def test_published_again_it_is_the_same_bit_for_bit(store, tmp_path):
    again = Store([str(tmp_path / "again")], ROUNDED)
    for at, table in store.lookup(keys(*ROWS)).rows(np.arange(len(ROWS))):
        assert len(at) == len(table)
        again.publish_table(table)
    assert held(again) == held(store)


def test_merged_and_copied_it_is_the_same(store, tmp_path):
    before = held(store)
    directory = store.places[0].directory
    compact(store, [shard.name for shard in shard_files(directory)])
    (merged,) = shard_files(directory)
    with open_shard(merged) as file:
        assert file.rounded
    assert held(store) == before
    place = str(tmp_path / "store")
    (identity,) = described_references(place).values()
    assert identity == ROUNDED
    (whole,) = copy_shards(place, str(tmp_path / "whole"), [identity])
    (rows,) = [copy_rows(keys(*ROWS), place, str(tmp_path / "rows"), identity)]
    assert (whole.unsound, rows.unsound) == ({}, {})
    assert held(Store([str(tmp_path / "whole")], ROUNDED)) == before == held(Store([str(tmp_path / "rows")], ROUNDED))


def test_a_rounded_shard_may_not_stand_for_exact_scores(store, tmp_path):
    exact = tmp_path / "store" / REFERENCE.reference_id
    store.places[0].directory.rename(exact)
    Store([str(tmp_path / "store")], REFERENCE).publish(ROWS[:1])
    (copied,) = copy_shards(str(tmp_path / "store"), str(tmp_path / "other"), [REFERENCE])
    assert (copied.shards, len(copied.unsound)) == (1, 2)
    assert "fixed point" in next(iter(copied.unsound.values()))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e-6, -1e6, -3e38])
def test_what_fixed_point_cannot_keep_is_refused(store, value):
    with pytest.raises(CheckError, match="row 1"):
        store.publish([row(30), Scored(b"\3" * 32, 1, np.array([-1.0, value], np.float32))])


def test_another_schema_is_damage_still(store, tmp_path):
    path = tmp_path / "shard.parquet"
    write_parquet(
        path, rounded(_table(ROWS[:2])).rename_columns(["key", "prompt_tokens", "response_tokens", "x", "logp"])
    )
    with pytest.raises(Unsound, match="another schema"), open_shard(path):
        pass


def test_it_takes_less_than_half_the_bytes(tmp_path):
    rows = [row(number, 4000) for number in range(50)]
    sizes = []
    for reference in (REFERENCE, ROUNDED):
        Store([str(tmp_path / reference.reference_id[:4])], reference).publish(rows)
        (shard,) = shard_files(tmp_path / reference.reference_id[:4] / reference.reference_id)
        sizes.append(shard.stat().st_size / 200_000)
    assert sizes[1] < 1.85
    assert sizes[1] < 0.55 * sizes[0]


def test_exact_references_keep_their_identity():
    assert "logps" not in REFERENCE.described()["numerics"]
    assert ROUNDED.described()["numerics"]["logps"] == "fixed_point"
    assert "fixed point" in ROUNDED.numerics.words
