"""Listing and checking do the same at a directory and at a bucket."""

import pytest

from pipeline.errors import CheckError, RefscoreError
from pipeline.store.registrations import registered
from pipeline.store.store import Store
from pipeline.store.tidying.inventory import holding, references, shard_entries
from stages import store as stage
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE, keys, scored
from tests.store.tidied import NOW, OTHER, damage, names, refused, shards


def test_files_of_a_place(where, tmp_path):
    place = Store([where], REFERENCE).places[0]
    assert place.entries() == []
    place.write("runs/a.json", b"first")
    place.write("runs/a.json", b"second")
    assert place.create("claims/b", b"12345")
    assert not place.create("claims/b", b"other")
    assert [(entry.name, entry.bytes) for entry in place.entries()] == [("claims/b", 5), ("runs/a.json", 6)]
    assert all(abs(entry.changed - NOW) < 3600 for entry in place.entries())
    assert place.read("runs/a.json") == b"second"
    with place.open("runs/a.json") as file:
        file.seek(2)
        assert file.read(3) == b"con"
    folder = tmp_path / "runs"
    folder.mkdir()
    assert place.local("runs/a.json", tmp_path).read_bytes() == b"second"
    place.remove("runs/a.json")
    place.remove("runs/a.json")
    assert [entry.name for entry in place.entries()] == ["claims/b"]
    for asked in (place.read, place.open, lambda name: place.local(name, tmp_path), place.set_aside):
        with pytest.raises(FileNotFoundError):
            asked("runs/a.json")


def test_what_a_store_holds(where):
    assert len(Store([where], REFERENCE).lookup(keys(scored(1))).missing) == 1
    store, other = Store([where], REFERENCE), Store([where], OTHER)
    store.publish([scored(n) for n in range(10)])
    # two of them twice
    store.publish([scored(n) for n in range(8, 12)])
    other.publish([scored(1)])
    assert sorted(references(where)) == sorted([REFERENCE.reference_id, OTHER.reference_id])
    held = holding(REFERENCE.reference_id, store.places[0])
    size = sum(entry.bytes for entry in shard_entries(store.places[0].entries()))
    assert (held.sequences, held.tokens, held.shards, held.bytes) == (12, 12 * 6, 2, size)
    assert held.problems == []
    store.places[0].write(shards(store)[0], b"no Parquet")
    held = holding(REFERENCE.reference_id, store.places[0])
    assert held.shards == 1
    assert "1 shards cannot be read" in held.problems[0]


def test_ls_names_the_runs_that_are_registered(where, tmp_path, capsys):
    store = Store([where], REFERENCE)
    store.register(tmp_path / "early")
    assert names(store) == []  # a place that holds nothing stays as it is
    store.publish([scored(1)])
    for _ in range(2):
        store.register(tmp_path / "run")
    assert [run.name for run in registered(store.places[0], store.places[0].entries())] == ["run"]
    stage.ls(where)
    said = capsys.readouterr().out
    assert REFERENCE.reference_id[:12] in said
    assert "run" in said


def test_a_bucket_that_may_only_be_read_registers_nothing(bucket, monkeypatch, tmp_path):  # noqa: F811
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    refused(monkeypatch, store, "pipe_file")
    store.register(tmp_path / "run")
    assert not [name for name in names(store) if name.startswith("runs/")]


def test_verify_sets_damaged_shards_aside(where, capsys):
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    store.publish([scored(2)])
    first, second = shards(store)
    stage.verify(where)
    assert "2 shards checked, 0 damaged" in capsys.readouterr().out
    damage(store, first)
    with pytest.raises(CheckError, match="1 shards were damaged"):
        stage.verify(where)
    assert f"corrupt/{first}" in names(store)
    assert shards(store) == [second]
    stage.verify(where)
    # the same rows, published again, stand under the same name
    assert len(Store([where], REFERENCE).lookup(keys(scored(1), scored(2))).missing) == 1


def test_a_damaged_object_that_may_not_be_deleted_is_named_and_stays(bucket, monkeypatch, caplog):  # noqa: F811
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    (name,) = shards(store)
    damage(store, name)
    refused(monkeypatch, store, "rm_file")
    assert "bytes are not those" in store.places[0].set_aside(name)
    assert "cannot be moved (Access Denied)" in caplog.text
    assert shards(store) == [name]


def test_an_object_that_is_replaced_while_it_is_looked_at_stays(bucket, monkeypatch):  # noqa: F811
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    (name,) = shards(store)
    sound = store.places[0].read(name)
    damage(store, name)
    check = store.places[0].local

    def published_anew_meanwhile(name, folder):
        path = check(name, folder)
        store.places[0].write(name, sound + b"!")
        return path

    monkeypatch.setattr(store.places[0], "local", published_anew_meanwhile)
    assert store.places[0].set_aside(name)
    assert store.places[0].read(name) == sound + b"!"
    assert not [name for name in names(store) if name.startswith("corrupt/")]


def test_shards_that_vanish_while_they_are_listed_are_passed_over(where, monkeypatch, capsys):
    store = Store([where], REFERENCE)
    for number in range(3):
        store.publish([scored(number)])
    gone = shards(store)[0]
    place = type(store.places[0])
    listed = place.entries

    def and_one_goes(self):
        entries = listed(self)
        self.remove(gone)
        return entries

    monkeypatch.setattr(place, "entries", and_one_goes)
    stage.ls(where)
    stage.verify(where)
    assert "2 shards checked, 0 damaged" in capsys.readouterr().out
    stage.compact(where)
    assert "merged 2 shards" in capsys.readouterr().out
    monkeypatch.setattr(place, "entries", listed)
    assert len(shards(store)) == 1
    rows = [scored(number) for number in range(3)]
    assert len(Store([where], REFERENCE).lookup(keys(*rows)).held) == 2


def test_a_store_that_is_not_there_or_cannot_be_listed_is_a_message(bucket, tmp_path, monkeypatch):  # noqa: F811
    for name in (str(tmp_path / "none"), "s3://no-such-bucket-here/x", bucket):
        with pytest.raises(RefscoreError, match="does not exist"):
            references(name)
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    refused(monkeypatch, store, "find")
    with pytest.raises(RefscoreError, match=r"cannot be listed \(Access Denied\)"):
        store.places[0].entries()
