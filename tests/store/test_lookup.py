"""Keys are found wherever they stand: however alike, however often asked for, while shards are merged under the reader."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.tables import write_parquet
from pipeline.errors import RefscoreError
from pipeline.models.identity import ModelIdentity
from pipeline.store.identity import Numerics, ReferenceIdentity
from pipeline.store.lookup import Lookup
from pipeline.store.shard import sha256_now, shard_files
from pipeline.store.store import Scored, Store
from pipeline.store.tidying.compaction import compact

REFERENCE = ReferenceIdentity(ModelIdentity({"w": "00"}, {}), Numerics("vllm", "0", "cpu", "float32", "float32"))


def row(key):
    draw = np.random.default_rng(list(key))
    return Scored(key, 3, -draw.random(int(draw.integers(1, 9)), dtype=np.float32))


def array(keys):
    return pa.array(keys, pa.binary(32))


def some_keys(alike, number=60):
    draw = np.random.default_rng(0)
    return list(dict.fromkeys(b"\7" * alike + draw.bytes(32 - alike) for _ in range(2 * number)))[:number]


@pytest.fixture
def store(tmp_path):
    return Store([str(tmp_path)], REFERENCE)


def shards(store):
    return shard_files(store.places[0].directory)


def answers(lookup, positions):
    found = {}
    for part, table in lookup.rows(positions):
        assert len(part) == len(table)
        for position, one in zip(part.tolist(), table.to_pylist(), strict=True):
            assert position not in found
            found[position] = one
    return found


@pytest.mark.parametrize("alike", [0, 8, 16, 31])
def test_every_held_position_gets_the_row_of_its_own_key(store, alike, monkeypatch):
    keys = some_keys(alike)
    for start in (0, 15, 30):
        store.publish([row(key) for key in keys[start : start + 15]])
    draw = np.random.default_rng(1)
    asked = [keys[at] for at in draw.integers(len(keys), size=300)]
    lookup = store.lookup(array(asked))
    positions = np.arange(20, 280)
    found = answers(lookup, positions)
    assert set(found) == {at for at in positions if asked[at] in keys[:45]}
    for position, one in found.items():
        truth = row(asked[position])
        assert (one["key"], one["logps"]) == (truth.key, truth.logps.tolist())
    held = set(asked) & set(keys[:45])
    assert {asked[at] for at in lookup.held} == held
    firsts = [at for at, key in enumerate(asked) if key not in asked[:at]]
    assert sorted([*lookup.held, *lookup.missing]) == firsts


def missing_of(keys):
    return Lookup([], keys).missing.tolist()


@pytest.mark.parametrize("alike", [0, 8, 31])
def test_the_first_of_each_key_is_found_however_alike_they_are(alike):
    draw = np.random.default_rng(0)
    some = [b"\0" * alike + draw.bytes(32 - alike) for _ in range(50)] + [b"\0" * 32]
    asked = [some[at] for at in draw.integers(len(some), size=400)]
    seen = set()
    expected = [at for at, key in enumerate(asked) if key not in seen and not seen.add(key)]
    assert missing_of(array(asked)) == expected
    # a part of a longer array
    assert missing_of(array([some[0], *asked, some[0]])[1:-1]) == expected
    assert missing_of(array(asked)[:1]) == [0]
    assert missing_of(array([])) == []


def test_a_shard_of_many_row_groups_is_read_where_the_keys_stand(store, monkeypatch):
    monkeypatch.setattr("pipeline.artifacts.tables._AT_ONCE", 7)
    keys = some_keys(0)
    store.publish([row(key) for key in keys])
    found = answers(store.lookup(array(keys)), np.arange(len(keys)))
    assert [found[at]["logps"] for at in range(len(keys))] == [row(key).logps.tolist() for key in keys]


def test_shards_merged_between_looking_up_and_reading_are_looked_up_again(store):
    keys = some_keys(0)
    for start in range(0, 60, 10):
        store.publish([row(key) for key in keys[start : start + 10]])
    lookup = store.lookup(array(keys))
    parts = lookup.rows(np.arange(60))
    seen = [next(parts)]
    compact(store, [shard.name for shard in shards(store)])
    seen += parts
    positions = np.concatenate([part for part, _ in seen])
    assert sorted(positions) == list(range(60))
    for part, table in seen:
        assert table["key"].to_pylist() == [keys[at] for at in part]
    # and once more, from the merged one
    assert len(answers(lookup, np.arange(60))) == 60


def test_a_bit_that_flips_after_the_lookup_is_a_miss_and_no_number(store):
    keys = some_keys(0)
    store.publish([row(key) for key in keys])
    (shard,) = shards(store)
    sound = shard.read_bytes()
    missed = 0
    for at in range(4, len(sound), 61):
        shard.write_bytes(sound)
        lookup = store.lookup(array(keys))
        shard.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        found = answers(lookup, np.arange(60))
        assert all(one["logps"] == row(keys[at]).logps.tolist() for at, one in found.items())
        assert sorted([*found, *lookup.missing]) == list(range(60))
        missed += not found
        store.places[0]._unsound.clear()
    assert missed > 10


def test_a_link_to_a_shard_that_is_gone_counts_as_a_miss(store, tmp_path):
    keys = some_keys(0)
    store.publish([row(key) for key in keys])
    (shard,) = shards(store)
    shard.rename(tmp_path / "elsewhere.parquet")
    shard.symlink_to(tmp_path / "nowhere.parquet")
    assert len(store.lookup(array(keys)).missing) == 60


def test_a_file_of_another_schema_is_set_aside_though_its_bytes_are_its_name_s(store, caplog):
    store.publish([row(b"1" * 32)])
    other = store.places[0].directory / "other.parquet"
    write_parquet(other, pa.table({"key": ["a"]}))
    other.rename(other.with_name(f"scores-{sha256_now(other)}.parquet"))
    assert store.lookup(array([b"1" * 32])).held.tolist() == [0]
    assert "another schema" in caplog.text
    assert len(shards(store)) == 1


def test_nothing_asked_is_nothing_found(store):
    store.publish([row(key) for key in some_keys(0)])
    lookup = store.lookup(array([]))
    assert lookup.missing.tolist() == lookup.held.tolist() == []
    assert answers(lookup, np.arange(0)) == {}


class Counting:
    """A place that counts what it is asked to examine, and answers as it is told."""

    def __init__(self, place, answer):
        self.place, self.answer, self.asked = place, answer, []

    def __getattr__(self, name):
        return getattr(self.place, name)

    def examine(self, shard, problem):
        self.asked.append((shard, problem))
        return self.answer


@pytest.mark.parametrize(("sound", "times"), [(True, 3), (False, 6)])
def test_a_shard_that_reads_differently_each_time_is_an_error_that_names_it(store, monkeypatch, sound, times):
    """Read whole it is sound, or it cannot be set aside: what lies between is to blame, and the reader does not go on for ever."""
    key = some_keys(0)[0]
    store.publish([row(key)])
    (shard,) = shards(store)
    place = Counting(store.places[0], sound)
    lookup = Lookup([place], array([key]))
    monkeypatch.setattr("pipeline.store.lookup.shard_problem", lambda file, table: "row 0: a value that flickers")
    with pytest.raises(RefscoreError, match=f"{shard.name} reads differently each time .*flickers.*memory"):
        answers(lookup, np.array([0]))
    assert place.asked == [(shard.name, "row 0: a value that flickers")] * times


def test_a_doubt_that_passes_costs_a_second_look(store, monkeypatch):
    key = some_keys(0)[0]
    store.publish([row(key)])
    place = Counting(store.places[0], True)
    lookup = Lookup([place], array([key]))
    problems = iter(["once", "twice", None])
    monkeypatch.setattr("pipeline.store.lookup.shard_problem", lambda file, table: next(problems))
    assert answers(lookup, np.array([0]))[0]["key"] == key
    assert [problem for _, problem in place.asked] == ["once", "twice"]


def test_a_shard_that_is_listed_and_never_there_is_an_error_that_names_it(store, monkeypatch):
    key = some_keys(0)[0]
    store.publish([row(key)])
    place = Counting(store.places[0], True)
    monkeypatch.setattr("pipeline.store.local_places.shard_names", lambda _: ["scores-gone.parquet"])
    monkeypatch.setattr("pipeline.store.places.time.sleep", lambda _: None)
    with pytest.raises(RefscoreError, match=r"scores-gone\.parquet is listed but cannot be read, 6 times"):
        Lookup([place], array([key]))
