"""The store returns what was published or nothing; damage is set aside and costs a miss."""

import hashlib
import logging

import numpy as np
import polars as pl
import pytest

from pipeline.errors import CheckError
from pipeline.identity import Numerics, ReferenceIdentity, key_of
from pipeline.schema import SCORES, write_parquet
from pipeline.store import Scored, Store, check_shard

REFERENCE = ReferenceIdentity({"w": "00"}, {}, Numerics("vllm", "0", "cpu", "float32", "float32"))


def scored(number, length=5):
    logps = -np.random.default_rng(number).random(length, dtype=np.float32)
    return Scored(key_of("00" * 32, [number], range(length)), 1, logps)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", REFERENCE)


def test_what_was_published_is_found_bit_for_bit(store):
    rows = [scored(n, length=n + 1) for n in range(20)]
    store.publish(rows[:12])
    store.publish(rows[12:])
    found = store.found([row.key for row in rows] + [b"\0" * 32])
    assert len(found) == 20
    logps = dict(zip(found["key"], found["logps"], strict=True))
    sums = dict(zip(found["key"], found["logp"], strict=True))
    for row in rows:
        assert np.array_equal(logps[row.key].to_numpy(), row.logps)
        assert sums[row.key] == row.logps.astype(np.float64).sum()
    assert store.held([rows[3].key, b"\0" * 32]) == {rows[3].key}


def test_opening_and_asking_creates_nothing(store, tmp_path):
    assert store.held([b"\0" * 32]) == set()
    assert store.found([b"\0" * 32]).is_empty()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-6])
def test_a_score_that_cannot_be_true_is_never_stored(store, value):
    bad = Scored(b"\1" * 32, 1, np.array([-1.0, value], dtype=np.float32))
    with pytest.raises(CheckError, match="cannot be true"):
        store.publish([scored(1), bad])
    assert not list(store.directory.glob("scores-*"))


def test_rows_published_twice_are_returned_once(store):
    rows = [scored(1), scored(2)]
    store.publish(rows)
    store.publish([scored(2), scored(3)])
    assert len(store.found([row.key for row in [*rows, scored(3)]])) == 3
    # the very same shard again is no error: its name is its content
    store.publish(rows)
    assert len(list(store.directory.glob("scores-*.parquet"))) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_shard_is_set_aside_and_counts_as_a_miss(store, damage, caplog):
    good, bad = store.publish([scored(1)]), store.publish([scored(2)])
    content = bytearray(bad.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    bad.write_bytes({"flip": content, "truncate": content[:-7], "empty": b"", "foreign": good.read_bytes()}[damage])
    with caplog.at_level(logging.WARNING):
        found = store.found([scored(1).key, scored(2).key])
    assert found["key"].to_list() == [scored(1).key]
    assert (store.directory / "corrupt" / bad.name).exists()
    assert len(caplog.records) == 1
    store.publish([scored(2)])
    assert len(store.found([scored(1).key, scored(2).key])) == 2


def test_leftovers_of_a_killed_writer_are_not_read(store):
    shard = store.publish([scored(1)])
    (store.directory / ".tmp-1-ab-scores.parquet").write_bytes(shard.read_bytes()[:50])
    assert len(store.found([scored(1).key])) == 1


def test_the_whole_check_sees_a_wrong_sum(store):
    shard = store.publish([scored(1)])
    assert check_shard(shard) is None
    wrong = pl.read_parquet(shard).with_columns(pl.col("logp") - 1.0)
    other = shard.with_name("other.parquet")
    write_parquet(other, wrong.to_arrow().cast(SCORES))
    renamed = other.rename(shard.with_name(f"scores-{hashlib.sha256(other.read_bytes()).hexdigest()}.parquet"))
    assert "not the sum" in check_shard(renamed)
