"""An index changes how long a question takes, never its answer: against a plain dictionary, whatever happens to shards and indexes."""

import logging
import os
import random

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import list_column
from pipeline.store.index import index_file, indexes
from pipeline.store.shard import facts_of, open_shard, shard_files
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import compact
from tests.store.test_store import REFERENCE


@pytest.fixture
def small(monkeypatch):
    """Indexes of two shards, in pages of few entries, merged a few at a time."""
    monkeypatch.setattr(indexes, "WORTH_SHARDS", 2)
    monkeypatch.setattr(indexes, "_AT_ONCE", 64)
    for module in (indexes, index_file):
        monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(index_file, "GROUP", 3)
    monkeypatch.setattr(index_file, "FILTER", 2)
    # three words of a key decide between two of a filter
    monkeypatch.setattr(index_file, "_in_filter", lambda words: (words[:, 1] >> np.uint64(63), _masks(words[:, 1])))
    monkeypatch.setattr(index_file, "_PAGES_AT_ONCE", 4)
    monkeypatch.setattr(index_file, "_GROUPS_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.store.places.time.sleep", lambda _: None)


def _masks(second):
    return np.uint64(1) << (second & np.uint64(63)) | np.uint64(1) << (second >> np.uint64(6) & np.uint64(63))


def keys_array(keys):
    return pa.array(keys, pa.binary(32))


def table_of(keys, version):
    logps = [values(key, version) for key in keys]
    return pa.table(
        [
            keys_array(keys),
            pa.array([3] * len(keys), pa.int32()),
            pa.array([len(row) for row in logps], pa.int32()),
            list_column(logps, SCORES.field("logps").type),
            pa.array([float(row.sum(dtype=np.float64)) for row in logps], pa.float64()),
        ],
        schema=SCORES,
    )


def values(key, version):
    """Scores of a key as one publication has them: no two have the same."""
    draw = np.random.default_rng([*key, version])
    return -draw.random(int(draw.integers(1, 6)), dtype=np.float32)


def pool_of(draw):
    """Keys, many of which begin alike."""
    alike = [draw.randbytes(8) for _ in range(4)]
    far = [draw.randbytes(31) for _ in range(2)]
    keys = [draw.randbytes(32) for _ in range(120)]
    keys += [draw.choice(alike) + draw.randbytes(24) for _ in range(60)]
    keys += [draw.choice(far) + bytes([number]) for number in range(20)]
    return keys


class World:
    """A store at a few places, and what a dictionary says of it."""

    def __init__(self, where, seed):
        self.draw = random.Random(seed)
        self.pool = pool_of(self.draw)
        self.places = [str(where / name) for name in "abc"]
        self.contents = [{} for _ in self.places]  # of each place: shard name -> (published, {key: version})
        self.versions = 0
        for place in self.places:
            (where / place).mkdir()
        self.store = Store(self.places, REFERENCE)

    def directory(self, number):
        return self.store.places[number].directory

    def publish(self):
        number = self.draw.randrange(len(self.places))
        keys = self.draw.sample(self.pool, self.draw.randint(1, 40))
        self.versions += 1
        published = self.draw.choice([self.versions, self.draw.randint(0, self.versions)])
        at = Store([self.places[number]], REFERENCE)
        name = at.publish_table(table_of(keys, self.versions), [{}], published)
        self.contents[number][name] = published, dict.fromkeys(keys, self.versions)

    def some_shard(self):
        number = self.draw.randrange(len(self.places))
        names = sorted(self.contents[number])
        return (number, self.draw.choice(names)) if names else (None, None)

    def vanish(self):
        number, name = self.some_shard()
        if name:
            (self.directory(number) / name).unlink()
            del self.contents[number][name]

    def damage(self):
        number, name = self.some_shard()
        if name:
            path = self.directory(number) / name
            content = bytearray(path.read_bytes())
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(content)
            del self.contents[number][name]

    def merge(self):
        number = self.draw.randrange(len(self.places))
        names = sorted(self.contents[number])
        group = self.draw.sample(names, min(len(names), self.draw.randint(2, 5)))
        before, there = self.answer_at(number), {path.name for path in shard_files(self.directory(number))}
        compact(Store([self.places[number]], REFERENCE), sorted(group))
        left = {path.name for path in shard_files(self.directory(number))}
        merged = {name: content for name, content in self.contents[number].items() if name in left}
        for name in left - there:
            with open_shard(self.directory(number) / name) as file:
                keys, published = file.read(columns=["key"])["key"].to_pylist(), facts_of("", file).published
            merged[name] = published, {key: before[key] for key in keys}
        self.contents[number] = merged
        assert self.answer_at(number) == before

    def harm_an_index(self):
        files = [path for number in range(len(self.places)) for path in sorted(self.directory(number).glob("index/*"))]
        if not files:
            return
        path, content = self.draw.choice(files), None
        kind = self.draw.randrange(5)
        content = bytearray(path.read_bytes())
        if kind == 0:
            path.unlink()
        elif kind == 1:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(content)
        elif kind == 2:
            path.write_bytes(content[: self.draw.randrange(len(content))])
        elif kind == 3:
            path.write_bytes(self.draw.randbytes(len(content)))
        else:  # one that is of other shards
            path.write_bytes(self.draw.choice(files).read_bytes())

    def answer_at(self, number):
        """Of each key the version that was published first at a place."""
        winners = {}
        for name, (published, held) in self.contents[number].items():
            for key, version in held.items():
                winners[key] = min(winners.get(key, (published, name, version)), (published, name, version))
        return {key: version for key, (_, _, version) in winners.items()}

    def answer(self):
        return {**self.answer_at(2), **self.answer_at(1), **self.answer_at(0)}

    def ask(self, *, between=lambda: None):
        asked = [self.draw.choice([*self.pool, self.draw.randbytes(32)]) for _ in range(self.draw.choice([1, 5, 300]))]
        store = self.store if self.draw.random() < 0.5 else Store(self.places, REFERENCE)
        lookup = store.lookup(keys_array(asked))
        self.compare(lookup, asked)
        between()
        rows = {}
        for positions, table in lookup.rows(np.arange(len(asked))):
            for position, row in zip(positions.tolist(), table.to_pylist(), strict=True):
                assert position not in rows
                rows[position] = row
        truth = self.answer()
        assert set(rows) == {position for position, key in enumerate(asked) if key in truth}
        for position, row in rows.items():
            assert row["key"] == asked[position]
            assert np.array_equal(np.array(row["logps"], np.float32), values(row["key"], truth[row["key"]]))
        self.compare(lookup, asked)

    def compare(self, lookup, asked):
        firsts = {}
        for position, key in enumerate(asked):
            firsts.setdefault(key, position)
        truth = self.answer()
        assert lookup.held.tolist() == sorted(at for key, at in firsts.items() if key in truth)
        assert lookup.missing.tolist() == sorted(at for key, at in firsts.items() if key not in truth)


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", "6"))))
def test_answers_are_a_dictionary_s_whatever_happens(tmp_path, small, seed):
    logging.disable(logging.WARNING)
    world = World(tmp_path, seed)
    made = 0
    for _ in range(60):
        step = world.draw.choice(
            [world.publish] * 5 + [world.vanish, world.damage, world.merge, world.harm_an_index, world.harm_an_index]
        )
        step()
        if world.draw.random() < 0.6:
            world.ask(between=world.draw.choice([lambda: None, world.vanish, world.harm_an_index]))
        made += len(list(tmp_path.glob("*/*/index/*")))
    assert made > 30
    assert not list(tmp_path.glob("*/*/.tmp-*"))
    logging.disable(logging.NOTSET)
