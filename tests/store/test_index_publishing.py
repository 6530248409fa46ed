"""Who publishes adds to the index: nobody reads shards to make it, files stay few, and no publication fails for it."""

import dataclasses
import logging
import random
import threading

import pytest

from pipeline.errors import RefscoreError
from pipeline.store.index import publishing
from pipeline.store.index.index_file import IndexFile, LocalBytes, write_index
from pipeline.store.index.merging import covering_all, merged_file
from pipeline.store.shard import shard_files
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import compact_small, groups_of
from pipeline.store.transfer import copy_rows, copy_shards
from tests.store.test_index import adding, again, found_in, index_files, keys_array, small, table_of  # noqa: F401
from tests.store.test_store import REFERENCE


@pytest.fixture
def store(tmp_path, adding):  # noqa: F811
    return Store([str(tmp_path / "store")], REFERENCE)


def publish(store, number, first=0, rows=9):
    """So many shards; their keys, and what they have."""
    truth = {}
    for version in range(first, first + number):
        draw = random.Random(version)
        keys = [draw.randbytes(32) for _ in range(rows)]
        store.publish_table(table_of(keys, version), [{}], published=version)
        truth |= dict.fromkeys(keys, version)
    return truth


def opened_by(store, truth, monkeypatch):
    """How many shards a question of a process that knows nothing opens."""
    opened = []
    from pipeline.store import local_places

    with monkeypatch.context() as counting:
        real = local_places.open_shard
        counting.setattr(local_places, "open_shard", lambda path, *more: (opened.append(path), real(path, *more))[1])
        assert len(again(store).lookup(keys_array(list(truth))).missing) == 0
    return len(opened)


def test_what_was_published_is_known_without_a_shard_being_opened(store, monkeypatch, caplog):
    truth = publish(store, 21)
    assert opened_by(store, truth, monkeypatch) == 1  # which waits, as two are worth a file here
    truth |= publish(store, 1, 21) | publish(store, 1, 22)
    store.finish()
    assert opened_by(store, truth, monkeypatch) == 0
    assert found_in(again(store), truth) == len(truth)
    # each row stands where the index says: else that would be refused, and made again
    assert "is wrong" not in caplog.text


def test_a_publisher_that_is_killed_leaves_its_last_few_shards_uncovered(store, monkeypatch):
    monkeypatch.setattr(publishing, "WORTH_SHARDS", 16)
    truth = publish(store, 5 * 16 + 7)
    monkeypatch.setattr("pipeline.store.index.indexes.WORTH_SHARDS", 16)
    assert opened_by(store, truth, monkeypatch) == 7
    assert found_in(again(store), truth) == len(truth)


def test_many_rows_are_worth_a_file_as_many_shards_are(store, monkeypatch):
    monkeypatch.setattr(publishing, "WORTH_SHARDS", 1000)
    monkeypatch.setattr(publishing, "WORTH_ROWS", 30)
    monkeypatch.setattr(publishing, "_FEW", 1000)
    publish(store, 3)
    assert not index_files(store)
    publish(store, 1, 3)
    assert len(index_files(store)) == 1


def test_a_few_shards_are_not_worth_a_file(store, monkeypatch):
    monkeypatch.setattr(publishing, "WORTH_SHARDS", 16)
    monkeypatch.setattr(publishing, "_FEW", 4)
    publish(store, 3)
    store.finish()
    assert not index_files(store)
    publish(store, 1, 3)
    store.finish()
    assert len(index_files(store)) == 1


def test_index_files_stay_few_and_speak_of_each_shard_once(store):
    sizes = []
    for number in range(128):
        publish(store, 2, 2 * number)
        sizes.append(len(index_files(store)))
    # four of a size become one: three of each of four sizes at most
    assert max(sizes) <= 12
    files = [IndexFile(path.name, LocalBytes(path)) for path in index_files(store)]
    assert sum(file.size for file in files) == 256 * 9
    assert len({shard.name for file in files for shard in file.shards}) == 256


def test_what_stands_in_two_files_stands_once_in_the_one_that_they_become(store, monkeypatch):
    """As it is if two publishers merged the same files at one moment."""
    truth = publish(store, 6)
    two = covering_all([IndexFile(path.name, LocalBytes(path)) for path in index_files(store)[:2]])
    path, name = merged_file(two, lambda: store.places[0].directory / "both", IndexFile.between)
    path.rename(path.with_name("index") / name)
    assert found_in(again(store), truth) == len(truth)
    truth |= publish(store, 2, 6)
    (path,) = index_files(store)
    file = IndexFile(path.name, LocalBytes(path))
    assert (file.size, len(file.shards)) == (8 * 9, 8)
    assert opened_by(store, truth, monkeypatch) == 0


def test_files_that_are_large_are_left_to_those_who_look_keys_up(store, monkeypatch):
    publish(store, 8)
    (large,) = index_files(store)
    monkeypatch.setattr(publishing, "_LARGEST", large.stat().st_size - 1)
    publish(store, 64, 8)
    assert large in index_files(store)
    assert len(index_files(store)) < 12


@pytest.mark.parametrize("refusal", [OSError(28, "No space left"), RefscoreError("Access Denied"), ValueError("?")])
def test_where_no_index_can_be_written_shards_are_published_all_the_same(store, monkeypatch, refusal, caplog):
    caplog.set_level(logging.INFO)

    def refuse(*_):
        raise refusal

    with monkeypatch.context() as refusing:
        refusing.setattr("pipeline.store.local_places.LocalPlace.put", refuse)
        truth = publish(store, 6)
    assert "no index of 2 shards is made" in caplog.text
    assert not index_files(store)
    assert not list(store.places[0].directory.glob("**/.tmp-*"))
    assert found_in(again(store), truth) == len(truth)
    # and the next ones stand in an index
    publish(store, 2, 6)
    assert index_files(store)


def test_where_the_index_cannot_be_listed_what_comes_is_a_file_of_its_own(store, monkeypatch):
    def refuse(*_):
        raise RefscoreError("Access Denied")

    truth = publish(store, 6)
    with monkeypatch.context() as refusing:
        refusing.setattr("pipeline.store.local_places.LocalPlace.index_files", refuse)
        truth |= publish(store, 2, 6)
    assert len(index_files(store)) == 4
    assert opened_by(store, truth, monkeypatch) == 0


def test_where_files_cannot_be_merged_what_comes_is_a_file_of_its_own(store, monkeypatch):
    truth = publish(store, 6)
    assert len(index_files(store)) == 3
    full = pytest.MonkeyPatch()
    full.setattr("pipeline.store.index.merging.write_index", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    truth |= publish(store, 2, 6)
    full.undo()
    assert len(index_files(store)) == 4
    assert not list(store.places[0].directory.glob("**/.tmp-*"))
    assert opened_by(store, truth, monkeypatch) == 0
    truth |= publish(store, 2, 8)
    assert len(index_files(store)) == 1


@pytest.mark.parametrize("part", ["directory", "page"])
def test_a_damaged_file_among_those_that_become_one_goes_and_costs_nothing_else(store, monkeypatch, part):
    truth = publish(store, 6)
    damaged = index_files(store)[1]
    content = bytearray(damaged.read_bytes())
    content[100 if part == "page" else -40] ^= 1
    damaged.write_bytes(content)
    truth |= publish(store, 2, 6)
    assert not damaged.exists()
    assert opened_by(store, truth, monkeypatch) == 2
    assert found_in(again(store), truth) == len(truth)


def test_a_file_that_another_publisher_takes_meanwhile_is_no_matter(store, monkeypatch):
    truth = publish(store, 6)
    gone = index_files(store)[0]
    files = type(store.places[0]).index_files
    monkeypatch.setattr(
        "pipeline.store.local_places.LocalPlace.index_files", lambda self: (files(self), gone.unlink())[0]
    )
    truth |= publish(store, 2, 6)
    monkeypatch.undo()
    assert len(index_files(store)) == 3
    assert found_in(again(store), truth) == len(truth)


def test_threads_share_a_publisher(store, monkeypatch):
    truths = [{} for _ in range(4)]

    def work(number):
        truths[number] |= publish(store, 20, 100 * number)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.finish()
    truth = {key: version for one in truths for key, version in one.items()}
    assert opened_by(store, truth, monkeypatch) == 0


def test_what_a_reader_indexed_meanwhile_is_not_indexed_again(store, monkeypatch):
    monkeypatch.setattr(publishing, "WORTH_SHARDS", 16)
    truth = publish(store, 5)
    for _ in range(2):
        assert len(store.lookup(keys_array(list(truth))).missing) == 0
    publish(store, 3, 5)
    store.finish()
    assert sorted(IndexFile(path.name, LocalBytes(path)).size for path in index_files(store)) == [3 * 9, 5 * 9]


def test_a_compaction_and_copies_leave_nothing_to_read_either(store, tmp_path, monkeypatch):
    truth = publish(store, 6)
    target = str(tmp_path / "copy")
    copy_shards(str(tmp_path / "store"), target, [REFERENCE])
    copied = Store([target], REFERENCE)
    assert opened_by(copied, truth, monkeypatch) == 0
    rows = str(tmp_path / "rows")
    copy_rows(keys_array(list(truth)), str(tmp_path / "store"), rows, REFERENCE)
    assert opened_by(Store([rows], REFERENCE), truth, monkeypatch) == 0
    assert [group for group, _ in compact_small(copied, copied.places[0].entries())] == [6]
    assert len(shard_files(copied.places[0].directory)) == 1
    assert opened_by(copied, truth, monkeypatch) == 0
    assert found_in(again(copied), truth) == len(truth)


def test_what_is_not_readable_when_it_was_published_is_not_added(store, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    truth = publish(store, 1)
    (shard,) = shard_files(store.places[0].directory)
    (tmp_path / "damaged").write_bytes(shard.read_bytes()[:-30])
    store.places[0].indexes.published(tmp_path / "damaged", shard.name)
    assert "is not added to an index" in caplog.text
    assert found_in(again(store), truth) == len(truth)


def test_sizes_are_of_few_classes():
    of_class = [publishing._size_class(8**n) for n in range(2, 9)]
    assert of_class == list(range(2, 9))
    assert publishing._size_class(8**5 - 1) == 4
    there = {f"{n}": 5000 for n in range(7)} | {"large": 10**6}
    assert publishing._alike(there, 6000) == [f"{n}" for n in range(7)]
    del there["3"]
    assert publishing._alike(there, 6000) == []
    # a cascade: what comes of these is like seven others
    there = {f"{n}": 5000 for n in range(7)} | {f"mid{n}": 40_000 for n in range(7)} | {"large": 10**6}
    assert len(publishing._alike(there, 6000)) == 14


def test_a_compaction_believes_no_index_in_what_it_merges(store):
    """Where an index says alike of all shards, those alone are merged that say so themselves."""
    truth = publish(store, 3)
    for number in range(2):
        keys = [random.Random(500 + number).randbytes(32)]
        store.publish_table(table_of(keys, 500 + number), [{}], published=100 + number, computed_by="f" * 64)
        truth |= dict.fromkeys(keys, 500 + number)
    store.finish()
    place = store.places[0]
    assert sorted(map(len, groups_of(place, place.entries()))) == [2, 3]
    for path in index_files(store):
        file = IndexFile(path.name, LocalBytes(path))
        lies = [dataclasses.replace(shard, computed_by="") for shard in file.shards]
        write_index(path, lies, [file.between(0, 2**64 - 1)])
    place = again(store).places[0]
    assert [len(group) for group in groups_of(place, place.entries())] == [5]
    assert list(compact_small(again(store), place.entries())) == [(5, 27)]
    assert found_in(again(store), truth) == len(truth)
    lookup = again(store).lookup(keys_array(list(truth)))
    assert [len(positions) for positions in lookup.held_from_adopted().values()] == [2]
