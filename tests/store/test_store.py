"""The store returns what was published or nothing; damage is set aside and costs a miss."""

import hashlib
import logging

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import write_parquet
from pipeline.errors import CheckError
from pipeline.models.identity import ModelIdentity
from pipeline.store.identity import Numerics, ReferenceIdentity, score_key
from pipeline.store.shard import check_shard
from pipeline.store.store import Scored, Store

REFERENCE = ReferenceIdentity(ModelIdentity({"w": "00"}, {}), Numerics("vllm", "0", "cpu", "float32", "float32"))


def scored(number, length=5):
    logps = -np.random.default_rng(number).random(length, dtype=np.float32)
    return Scored(score_key("00" * 32, [number], range(length)), 1, logps)


def keys(*rows):
    return pa.array([row.key if isinstance(row, Scored) else row for row in rows], pa.binary(32))


@pytest.fixture
def store(tmp_path):
    return Store([str(tmp_path / "store")], REFERENCE)


def shards(store):
    return sorted(store.places[0].directory.glob("scores-*.parquet"))


def test_what_was_published_is_found_bit_for_bit(store):
    rows = [scored(n, length=n + 1) for n in range(20)]
    store.publish(rows[:12])
    store.publish(rows[12:])
    found = store.lookup(keys(*rows, b"\0" * 32)).found()
    assert len(found) == 20
    logps = dict(zip(found["key"], found["logps"], strict=True))
    sums = dict(zip(found["key"], found["logp"], strict=True))
    for row in rows:
        assert np.array_equal(logps[row.key].to_numpy(), row.logps)
        assert sums[row.key] == row.logps.astype(np.float64).sum()


def test_what_is_missing_is_named_once_in_order(store):
    store.publish([scored(1), scored(2)])
    asked = keys(scored(5), scored(2), scored(4), scored(5))
    assert store.lookup(asked).missing.tolist() == [0, 2]


def test_opening_and_asking_creates_nothing(store, tmp_path):
    assert store.lookup(keys(scored(1))).missing.tolist() == [0]
    assert store.lookup(keys(scored(1))).found().is_empty()
    assert store.why_not_writable() is None
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-6])
def test_a_score_that_cannot_be_true_is_never_stored(store, value):
    bad = Scored(b"\1" * 32, 1, np.array([-1.0, value], dtype=np.float32))
    with pytest.raises(CheckError, match="cannot be true"):
        store.publish([scored(1), bad])
    assert not shards(store)


def test_rows_published_twice_are_returned_once(store):
    rows = [scored(1), scored(2)]
    store.publish(rows)
    store.publish([scored(2), scored(3)])
    assert len(store.lookup(keys(*rows, scored(3))).found()) == 3
    # the very same shard again is no error: its name is its content
    table = store.lookup(keys(*rows)).found().to_arrow().cast(SCORES)
    names = {store.publish_table(table, published=7) for _ in range(2)}
    assert len(names) == 1
    assert len(shards(store)) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_shard_is_set_aside_and_counts_as_a_miss(store, damage, caplog):
    store.publish([scored(1)])
    (good,) = shards(store)
    store.publish([scored(2)])
    (bad,) = set(shards(store)) - {good}
    content = bytearray(bad.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    bad.write_bytes({"flip": content, "truncate": content[:-7], "empty": b"", "foreign": good.read_bytes()}[damage])
    with caplog.at_level(logging.WARNING):
        found = store.lookup(keys(scored(1), scored(2))).found()
    assert found["key"].to_list() == [scored(1).key]
    assert (bad.parent / "corrupt" / bad.name).exists()
    assert len(caplog.records) == 1
    assert store.lookup(keys(scored(1), scored(2))).missing.tolist() == [1]
    store.publish([scored(2)])
    assert len(store.lookup(keys(scored(1), scored(2))).found()) == 2


def test_leftovers_of_a_killed_writer_are_not_read(store):
    store.publish([scored(1)])
    (shard,) = shards(store)
    (shard.parent / ".tmp-1-ab-scores.parquet").write_bytes(shard.read_bytes()[:50])
    assert len(store.lookup(keys(scored(1))).found()) == 1


def test_the_whole_check_sees_a_wrong_sum(store):
    store.publish([scored(1)])
    (shard,) = shards(store)
    assert check_shard(shard) is None
    wrong = pl.read_parquet(shard).with_columns(pl.col("logp") - 1.0)
    other = shard.with_name("other.parquet")
    write_parquet(other, wrong.to_arrow().cast(SCORES))
    renamed = other.rename(shard.with_name(f"scores-{hashlib.sha256(other.read_bytes()).hexdigest()}.parquet"))
    assert "not the sum" in check_shard(renamed)


def test_the_first_place_is_written_and_all_are_read(tmp_path):
    Store([str(tmp_path / "team")], REFERENCE).publish([scored(1)])
    both = Store([str(tmp_path / "mine"), str(tmp_path / "team")], REFERENCE)
    assert both.lookup(keys(scored(1), scored(2))).missing.tolist() == [1]
    both.publish([scored(2)])
    assert not len(both.lookup(keys(scored(1), scored(2))).missing)
    assert len(list((tmp_path / "team").rglob("scores-*"))) == len(list((tmp_path / "mine").rglob("scores-*"))) == 1
