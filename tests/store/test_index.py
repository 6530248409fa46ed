"""An index changes how long a question takes, never its answer: against a plain dictionary, whatever happens to shards and indexes."""

import dataclasses
import fcntl
import logging
import os
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import list_column
from pipeline.errors import RefscoreError
from pipeline.store.index import index_file, indexes, merging, publishing
from pipeline.store.index.index_file import (
    IndexFile,
    LocalBytes,
    WrongIndex,
    by_key,
    entries_of,
    index_name,
    write_index,
)
from pipeline.store.index.matching import equal_pairs, runs_of
from pipeline.store.shard import ShardFacts, facts_of, open_shard, shard_files, words_of
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import compact
from tests.conftest import ROOT
from tests.store.test_store import REFERENCE

ADD = publishing.Additions.add


@pytest.fixture
def small(monkeypatch):
    """Indexes of two shards, in pages of few entries, merged a few at a time."""
    for module in (indexes, publishing):
        monkeypatch.setattr(module, "WORTH_SHARDS", 2)
    for module in (indexes, merging):
        monkeypatch.setattr(module, "AT_ONCE", 64)
    for module in (merging, index_file):
        monkeypatch.setattr(module, "PAGE", 8)
    monkeypatch.setattr(index_file, "GROUP", 3)
    monkeypatch.setattr(index_file, "FILTER", 2)
    # three words of a key decide between two of a filter
    monkeypatch.setattr(index_file, "_in_filter", lambda words: (words[:, 1] >> np.uint64(63), _masks(words[:, 1])))
    monkeypatch.setattr(index_file, "_PAGES_AT_ONCE", 4)
    monkeypatch.setattr(index_file, "_GROUPS_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.store.places.time.sleep", lambda _: None)
    # as if others had published, who make no index
    monkeypatch.setattr(publishing.Additions, "add", lambda *_: False)


@pytest.fixture
def adding(small, monkeypatch):
    """The same, and who publishes adds to the index."""
    monkeypatch.setattr(publishing.Additions, "add", ADD)
    monkeypatch.setattr(publishing, "_FEW", 1)
    monkeypatch.setattr(publishing, "_ALIKE", 4)


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
        self.publishers = [Store([place], REFERENCE) for place in self.places]

    def directory(self, number):
        return self.store.places[number].directory

    def publish(self):
        number = self.draw.randrange(len(self.places))
        keys = self.draw.sample(self.pool, self.draw.randint(1, 40))
        self.versions += 1
        published = self.draw.choice([self.versions, self.draw.randint(0, self.versions)])
        name = self.publishers[number].publish_table(table_of(keys, self.versions), [{}], published)
        if not self.draw.randrange(4):
            self.publishers[number].finish()
        if not self.draw.randrange(8):
            # killed, and another one begins
            self.publishers[number] = Store([self.places[number]], REFERENCE)
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
def test_answers_are_a_dictionary_s_whatever_happens(tmp_path, small, request, seed):
    if seed % 2:
        request.getfixturevalue("adding")
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


@pytest.fixture
def store(tmp_path, small):
    return Store([str(tmp_path / "store")], REFERENCE)


def filled(store, shards=6, rows=30):
    """Publish shards of keys, look once so that there is an index, and return keys and their versions."""
    draw = random.Random(1)
    truth = {}
    for version in range(shards):
        keys = [draw.randbytes(32) for _ in range(rows)]
        store.publish_table(table_of(keys, version), [{}], published=version)
        truth |= dict.fromkeys(keys, version)
    assert len(store.lookup(keys_array(list(truth))).held) == len(truth)
    return truth


def index_files(store):
    return sorted((store.places[0].directory / "index").glob("*"))


def found_in(store, truth):
    """Check every row that is found, and return how many of the keys these are."""
    lookup = store.lookup(keys_array(list(truth)))
    rows = lookup.found()
    for key, logps in rows.select("key", "logps").iter_rows():
        assert np.array_equal(np.array(logps, np.float32), values(key, truth[key]))
    assert len(rows) + len(lookup.missing) == len(truth)
    return len(rows)


def again(store):
    return Store([store.places[0].name.rsplit("/", 1)[0]], REFERENCE)


@pytest.mark.parametrize("step", [7, 11])
def test_any_flipped_bit_of_an_index_costs_nothing_but_the_index(store, step, caplog):
    truth = filled(store, shards=3, rows=12)
    (path,) = index_files(store)
    sound = path.read_bytes()
    for bit in range(3, 8 * len(sound), step * 8 + 1):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert found_in(again(store), truth) == len(truth)


def lying(store, lie):
    """Replace the store's index by a sound file of the same shards, whose entries and facts `lie` changes."""
    (path,) = index_files(store)
    opened = IndexFile(path.name, LocalBytes(path))
    entries = opened.between(0, 2**64 - 1).copy()
    shards = opened.shards
    entries, shards = lie(entries, shards)
    path.unlink()
    write_index(path, shards, [by_key(entries)] if len(entries) else [])
    return path


def swapped(entries, shards):
    entries[:, 4] = np.roll(entries[:, 4], 1)
    return entries, shards


def beyond(entries, shards):
    entries[5, 4] += np.uint64(10**6)
    return entries, shards


def of_no_shard(entries, shards):
    entries[5, 4] |= np.uint64(2**62)
    return entries, shards


def published_otherwise(entries, shards):
    return entries, [dataclasses.replace(shard, published=-shard.published - 1) for shard in shards]


def of_sums(entries, shards):
    return entries, [dataclasses.replace(shard, sums_only=True) for shard in shards]


def computed_elsewhere(entries, shards):
    return entries, [dataclasses.replace(shard, computed_by="00") for shard in shards]


@pytest.mark.parametrize("lie", [swapped, beyond, of_no_shard, published_otherwise, of_sums, computed_elsewhere])
def test_an_index_that_lies_is_found_out_where_a_row_is_read_and_made_again(store, lie, caplog):
    truth = filled(store)
    path = lying(store, lie)
    told = path.read_bytes()
    assert found_in(again(store), truth) == len(truth)
    assert "is wrong" in caplog.text
    assert not path.exists() or path.read_bytes() != told
    caplog.clear()
    assert found_in(again(store), truth) == len(truth)
    assert not caplog.text


def test_keys_that_an_index_hides_are_missing_and_those_that_it_invents_are_in_the_end(store, caplog):
    truth = filled(store)
    hidden, invented = list(truth)[:5], [bytes([number]) * 32 for number in range(5)]

    def lie(entries, shards):
        entries = entries[~np.isin(entries[:, 0], words_of(keys_array(hidden))[:, 0])]
        more = entries_of(words_of(keys_array(invented)), 0)
        return np.concatenate([entries, more]), shards

    lying(store, lie)
    lookup = again(store).lookup(keys_array([*truth, *invented]))
    assert len(lookup.missing) == 5
    rows = lookup.found()
    assert set(rows["key"]) <= set(truth)
    assert lookup.missing.tolist() == list(range(len(truth), len(truth) + 5))


def hiding(entries, shards):
    return entries[::2], shards


def in_another_shard(entries, shards):
    """Every key is said to stand where another does."""
    entries[:, 4] = np.roll(entries[:, 4], 1)
    return entries, shards


@pytest.mark.parametrize("lie", [hiding, in_another_shard])
def test_merging_removes_nothing_that_an_index_alone_says_to_stand_elsewhere(store, lie):
    truth = filled(store)
    lying(store, lie)
    names = again(store).places[0].listed().shards
    for group in (names[:3], names[3:]):
        compact(again(store), group)
    for path in (store.places[0].directory / indexes.FOLDER).iterdir():
        path.unlink()
    assert found_in(again(store), truth) == len(truth)


def test_an_index_that_lies_where_it_cannot_be_removed_is_believed_once(store, tmp_path, monkeypatch):
    truth = filled(store)
    invented = [bytes([number]) * 32 for number in range(5)]

    def lie(entries, shards):
        return np.concatenate([entries, entries_of(words_of(keys_array(invented)), 0)]), shards

    path = lying(store, lie)

    def refuse(*_):
        raise RefscoreError("no rights")

    monkeypatch.setattr("pipeline.store.local_places.LocalPlace.remove", refuse)
    monkeypatch.setattr("pipeline.store.local_places.LocalPlace.put", refuse)
    first = again(store).lookup(keys_array([*truth, *invented]))
    assert len(first.missing) == 0
    assert len(first.found()) == len(truth)
    assert path.exists()
    assert len(again(store).lookup(keys_array([*truth, *invented])).missing) == 5


def test_an_index_of_removed_shards_is_passed_over_and_goes(store):
    truth = filled(store)
    (before,) = index_files(store)
    compact(store, [path.name for path in shard_files(store.places[0].directory)])
    assert len(shard_files(store.places[0].directory)) == 1
    assert found_in(again(store), truth) == len(truth)
    store.publish_table(table_of([b"1" * 32], 90))
    truth[b"1" * 32] = 90
    assert found_in(again(store), truth) == len(truth)
    assert before not in index_files(store)
    assert len(index_files(store)) == 1


def test_an_index_that_is_of_removed_shards_in_the_main_is_made_anew(store):
    truth = filled(store)
    for path in shard_files(store.places[0].directory)[:4]:
        path.unlink()
    truth |= {bytes([version]) * 32: version for version in range(2)}
    for version in range(2):
        store.publish_table(table_of([bytes([version]) * 32], version), [{}])
    assert found_in(again(store), truth) == 2 * 30 + 2
    (path,) = index_files(store)
    assert IndexFile(path.name, LocalBytes(path)).size == 2 * 30 + 2


def test_there_are_few_index_files_however_often_shards_come(store):
    truth = {}
    for version in range(64):
        draw = random.Random(version)
        keys = [draw.randbytes(32) for _ in range(1 + version % 3)]
        store.publish_table(table_of(keys, version), [{}], published=version)
        truth |= dict.fromkeys(keys, version)
        if version % 2:
            assert len(store.lookup(keys_array(list(truth))).missing) == 0
    files = [IndexFile(path.name, LocalBytes(path)) for path in index_files(store)]
    sizes = sorted(file.size for file in files)
    assert sum(sizes) == len(truth)
    assert len(sizes) <= 4
    for number, size in enumerate(sizes[1:], 1):
        assert size > indexes._TIMES * sum(sizes[:number])
    assert found_in(again(store), truth) == len(truth)


def test_a_small_store_has_no_index(tmp_path):
    store = Store([str(tmp_path)], REFERENCE)
    for version in range(indexes.WORTH_SHARDS - 1):
        store.publish_table(table_of([bytes([version]) * 32], version))
    assert len(store.lookup(keys_array([b"\0" * 32])).held) == 1
    assert not index_files(store)
    store.publish_table(table_of([b"x" * 32], 1))
    assert len(store.lookup(keys_array([b"\0" * 32])).held) == 1
    assert len(index_files(store)) == 1


def test_covered_shards_are_not_opened_for_a_plan(store, monkeypatch):
    truth = filled(store)
    monkeypatch.setattr("pipeline.store.local_places.open_shard", lambda _: pytest.fail("opened"))
    asked = [*truth, b"1" * 32]
    assert again(store).lookup(keys_array(asked)).missing.tolist() == [len(truth)]


@pytest.mark.parametrize("refused", ["write_index", "put"])
def test_where_no_index_can_be_made_questions_are_answered_without(store, monkeypatch, refused):
    def refuse(*_):
        raise OSError(28 if refused == "put" else 30, "no")

    if refused == "write_index":
        monkeypatch.setattr(indexes, "write_index", refuse)
    else:
        monkeypatch.setattr("pipeline.store.local_places.LocalPlace.put", refuse)
    truth = filled(store)
    assert found_in(store, truth) == len(truth)
    assert not index_files(store)
    assert not list(store.places[0].directory.glob(".tmp-*"))


def test_who_makes_an_index_makes_it_alone(store, monkeypatch):
    holder = os.open(store.places[0].workspace(), os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    truth = filled(store)
    assert not index_files(store)
    os.close(holder)
    assert found_in(store, truth) == len(truth)
    assert len(index_files(store)) == 1


BUILDER = """
from contextlib import contextmanager
from pipeline.artifacts import durable
from tests.store.test_index import *
indexes.WORTH_SHARDS = publishing.WORTH_SHARDS = 2
indexes.AT_ONCE = merging.AT_ONCE = 64
merging.PAGE = index_file.PAGE = 8
@contextmanager
def not_alone(place):
    yield True
indexes.alone = publishing.alone = not_alone
publishing._ALIKE = 4
draw, where, mine = random.Random(int(sys.argv[2])), sys.argv[1], {}
adds, killed_at = sys.argv[3] == "adds", sys.argv[4:]
durable.reached = lambda point: point in killed_at and os.kill(os.getpid(), 9)
publisher = Store([where], REFERENCE)
for step in range(12):
    version = int(sys.argv[2]) * 100 + step
    keys = [draw.randbytes(32) for _ in range(9)]
    (publisher if adds else Store([where], REFERENCE)).publish_table(table_of(keys, version), [{}], published=version)
    mine |= dict.fromkeys(keys, version)
    assert found_in(Store([where], REFERENCE), mine) == len(mine)
"""


def builder(where, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(where), *map(str, arguments)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("how", [["adds"] * 4, ["asks"] * 4, ["adds", "asks"] * 2])
def test_many_who_make_and_merge_indexes_at_once_find_what_they_published(tmp_path, how):
    builders = [builder(tmp_path / "store", number, how[number]) for number in range(4)]
    for process in builders:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    store = Store([str(tmp_path / "store")], REFERENCE)
    draws = [random.Random(number) for number in range(4)]
    truth = {draw.randbytes(32): n * 100 + step for n, draw in enumerate(draws) for step in range(12) for _ in range(9)}
    assert found_in(store, truth) == len(truth)


@pytest.mark.parametrize(("how", "point"), [("asks", "index: put"), ("adds", "index: added")])
def test_who_is_killed_after_an_index_was_put_leaves_a_store_that_is_found_whole(tmp_path, how, point):
    process = builder(tmp_path / "store", 1, how, point)
    assert process.wait(timeout=300) == -9
    store = Store([str(tmp_path / "store")], REFERENCE)
    draw = random.Random(1)
    published = len(shard_files(store.places[0].directory))
    truth = {draw.randbytes(32): 100 + step for step in range(published) for _ in range(9)}
    assert len(index_files(store)) >= 1
    assert found_in(store, truth) == len(truth)


def test_an_index_file_holds_every_key_in_pages_that_no_first_word_leaves(tmp_path, monkeypatch):
    """At its real sizes, with runs of keys that begin alike and are longer than a page."""
    draw = np.random.default_rng(3)
    words = draw.integers(0, 2**64, (20_000, 4), dtype=np.uint64)
    words[:1500, 0] = words[0, 0]
    words[1500:1600] = words[1500]
    path = tmp_path / index_name([SHARDS[0].name])
    write_index(path, SHARDS[:1], [by_key(entries_of(words, 0))])
    file = IndexFile(path.name, LocalBytes(path))
    assert file.size == 20_000
    assert (np.diff(file.fences.astype(object)) > 0).all()
    asked = np.concatenate([words[::3], draw.integers(0, 2**64, (5000, 4), dtype=np.uint64)])
    asked = asked[np.argsort(asked[:, 0], kind="stable")]
    positions, _, rows = file.find(asked)
    assert (asked[positions] == words[rows]).all()
    known = {tuple(word) for word in words.tolist()}
    assert set(positions.tolist()) == {at for at, word in enumerate(asked.tolist()) if tuple(word) in known}
    # a key that stands a hundred times is found as often
    assert (words[rows] == words[1500]).all(axis=1).sum() == 100 * (asked == words[1500]).all(axis=1).sum()
    # and most of what is not there is known without its page
    absent = draw.integers(0, 2**64, (5000, 4), dtype=np.uint64)
    absent = absent[np.argsort(absent[:, 0])]
    pages = np.searchsorted(file.fences, absent[:, 0], side="right") - 1
    assert file._may_hold(absent[pages >= 0], pages[pages >= 0]).mean() < 0.05


SHARDS = [ShardFacts(f"scores-{number:064x}.parquet", 20_000, number, False, "") for number in range(2)]


@pytest.mark.parametrize("content", [b"", b"x" * 10, b"\0" * 60, b"x" * 5000])
def test_a_file_that_is_no_index_is_not_used(tmp_path, content):
    path = tmp_path / index_name([])
    path.write_bytes(content)
    with pytest.raises(WrongIndex):
        IndexFile(path.name, LocalBytes(path))


@pytest.mark.parametrize("wrong", [{"name": "../x"}, {"rows": -1}, {"rows": 2**32}, {"rows": "1"}, {"published": None}, {"sums_only": 1}])  # fmt: skip
def test_an_index_of_shards_that_cannot_be_is_not_used(tmp_path, wrong):
    shard = dataclasses.replace(SHARDS[0], **wrong)
    path = tmp_path / index_name([shard.name])
    write_index(path, [shard], [])
    with pytest.raises(WrongIndex, match="of which shards"):
        IndexFile(path.name, LocalBytes(path))


def test_pairs_of_equal_keys_against_a_dictionary():
    draw = np.random.default_rng(5)
    for _ in range(50):
        those = draw.integers(0, 3, (draw.integers(0, 40), 4), dtype=np.uint64)
        those = those[np.argsort(those[:, 0], kind="stable")]
        these = draw.integers(0, 3, (draw.integers(0, 40), 4), dtype=np.uint64)
        pairs = set(zip(*map(np.ndarray.tolist, equal_pairs(these, those)), strict=True))
        assert pairs == {
            (i, j) for i, one in enumerate(these.tolist()) for j, other in enumerate(those.tolist()) if one == other
        }


def test_runs_of_numbers():
    assert runs_of(np.array([], np.int64), 3) == []
    assert runs_of(np.array([0]), 3) == [(0, 1)]
    assert runs_of(np.array([0, 1, 2, 3, 4, 7, 9, 10]), 3) == [(0, 3), (3, 5), (7, 8), (9, 11)]
