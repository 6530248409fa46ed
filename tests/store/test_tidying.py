"""Listing, checking, tidying and merging do the same at a directory and at a bucket, and spare what somebody needs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import SCORES
from pipeline.errors import CheckError, ConfigError, RefscoreError
from pipeline.store import registrations
from pipeline.store.registrations import DAY, registered
from pipeline.store.store import Scored, Store
from pipeline.store.tidying import compaction, retention
from pipeline.store.tidying.claims import FOLDER, claimed, claiming, sweep
from pipeline.store.tidying.compaction import compact, compact_small, groups_of, identified
from pipeline.store.tidying.inventory import holding, references, shard_entries
from pipeline.store.tidying.retention import Rules, bytes_in, parts_of, removals_by, remove, seconds_in
from stages import store as stage
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE, keys, scored

OTHER = dataclasses.replace(REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, dtype="bfloat16"))
NOW = registrations.time.time()


@pytest.fixture(params=["directory", "bucket", "memory"])
def where(request, tmp_path):
    """A store's name."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    return str(tmp_path / "store") if request.param == "directory" else f"memory://{tmp_path.name}"


def names(store):
    return [entry.name for entry in store.places[0].entries()]


def shards(store):
    return [entry.name for entry in shard_entries(store.places[0].entries())]


def damage(store, name):
    """Another byte in the middle."""
    content = bytearray(store.places[0].read(name))
    content[100] ^= 1
    store.places[0].write(name, bytes(content))


def days_pass(monkeypatch, days):
    monkeypatch.setattr(registrations.time, "time", lambda: NOW + days * DAY)


def goes(where, rules=None, used=None, last=None):
    """Names of the files that go, by reference."""
    removals, _ = removals_by(rules or Rules(), parts_of(where, used or {}, last or {}))
    return {removal.part.reference_id: [entry.name for entry in removal.entries] for removal in removals}


def values(store, row):
    """What a reader gets."""
    found = store.lookup(keys(row)).found()
    return found["logps"][0].to_numpy().tolist() if len(found) else None


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


def refused(monkeypatch, store, method):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store.places[0]._files, method, refuse)


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


# --- what goes ---


def test_leftovers_and_what_was_set_aside_go_after_a_day(where, monkeypatch):
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    left = [f"{FOLDER}x.json", "corrupt/scores-x.parquet", f"{durable.TEMPORARY}1-scores.parquet"]
    for name in sorted(left):
        store.places[0].write(name, b"half")
    assert goes(where) == {}
    days_pass(monkeypatch, 1.1)
    assert goes(where) == {REFERENCE.reference_id: sorted(left)}
    before = shards(store)
    stage.gc(where, Rules(), apply=True)
    assert names(store) == ["reference.json", *before]


def test_a_job_that_nobody_scores_any_more_goes_and_one_that_is_scored_stays_whole(where, monkeypatch):
    place = Store([where], REFERENCE).places[0]
    for job in ("job-dead", "job-live"):
        place.write(f"{job}/missing/00000000.parquet", b"rows")
        place.write(f"{job}/claims/00000000.1.json", b"{}")
    place.write("reference.json", b"{}")
    entries = [
        dataclasses.replace(entry, changed=entry.changed - (0 if entry.name.startswith("job-live/claims") else 2 * DAY))
        for entry in place.entries()
    ]
    monkeypatch.setattr(type(place), "entries", lambda _: entries)
    (removal,) = removals_by(Rules(), parts_of(where, {}, {}))[0]
    assert sorted(entry.name for entry in removal.entries) == [
        "job-dead/claims/00000000.1.json", "job-dead/missing/00000000.parquet",
    ]  # fmt: skip


def test_a_reference_goes_whole(where, monkeypatch, tmp_path):
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    store.register(tmp_path / "gone")
    days_pass(monkeypatch, 3)
    ((removal,), _) = removals_by(Rules(unreferenced=True), parts_of(where, {}, {}))
    assert remove(removal)
    assert names(store) == []


@pytest.mark.parametrize("rules", [Rules(unreferenced=True), Rules(quota=1)])
@pytest.mark.parametrize("used", ["published", "registered"])
def test_what_somebody_has_used_since_it_was_listed_is_left(where, monkeypatch, tmp_path, capsys, rules, used):
    """A process that found its scores there a moment ago reads them in the end."""
    store, place = Store([where], REFERENCE), type(Store([where], REFERENCE).places[0])
    store.publish([scored(1)])
    store.publish([scored(2)])
    store.register(tmp_path / "gone")
    store.places[0].write("corrupt/scores-x.parquet", b"half")
    days_pass(monkeypatch, 3)
    created = place.entries

    def used_meanwhile(self):
        entries = created(self)
        if used == "published":
            store.publish([scored(3)])
        else:
            store.register(tmp_path / "new")
        monkeypatch.setattr(place, "entries", created)
        return entries

    monkeypatch.setattr(place, "entries", used_meanwhile)
    stage.gc(where, rules, apply=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{store.places[0].name} is left: somebody has used it since it was listed" in said
    assert len(Store([where], REFERENCE).lookup(keys(scored(1), scored(2))).held) == 2
    assert "corrupt/scores-x.parquet" not in names(store)  # nobody uses that


def test_a_reference_that_another_adopts_is_used_as_that_one_is(where, monkeypatch, tmp_path):
    adopted, by = (Store([where], one) for one in (REFERENCE, OTHER))
    adopted.publish([scored(1)])
    by.note(f"adopted-{REFERENCE.reference_id}.json", {})
    days_pass(monkeypatch, 60)
    assert goes(where, Rules(unreferenced=True)).keys() == {REFERENCE.reference_id, OTHER.reference_id}
    with monkeypatch.context() as patch:  # adopted today, by a reference that no run uses yet
        patch.setattr(retention, "_age", lambda entry: 0 if entry.name.startswith("adopted-") else 60 * DAY)
        for rules in (Rules(unreferenced=True), Rules(within=3 * DAY), Rules(quota=0)):
            assert goes(where, rules) == {}
    (tmp_path / "run").mkdir()
    by.register(tmp_path / "run")
    days_pass(monkeypatch, 62)
    for rules in (Rules(unreferenced=True), Rules(within=3 * DAY), Rules(quota=0)):
        assert goes(where, rules) == {}
    assert goes(where, Rules(within=DAY)).keys() == {REFERENCE.reference_id, OTHER.reference_id}


def test_a_run_on_a_disk_that_is_not_mounted_may_still_need_its_reference(where, monkeypatch, tmp_path):
    runs = tmp_path / "disk/runs"
    (runs / "run").mkdir(parents=True)
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    store.register(runs / "run")
    days_pass(monkeypatch, 3)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    assert goes(where, Rules(unreferenced=True)) == {}
    runs.mkdir(parents=True)
    assert goes(where, Rules(unreferenced=True)).keys() == {REFERENCE.reference_id}


def test_registrations_of_runs_that_are_gone_go_but_for_the_latest(where, monkeypatch, tmp_path):
    """It says when the reference was last used."""
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    (tmp_path / "there").mkdir()
    for day, run in enumerate(("there", "a", "b", "c")):
        days_pass(monkeypatch, day)
        store.register(tmp_path / run)
    days_pass(monkeypatch, 10)
    before = parts_of(where, {}, {})[0]
    (removal,) = removals_by(Rules(), [before])[0]
    assert len(removal.entries) == 2
    assert remove(removal)
    assert {run.name for run in registered(store.places[0], store.places[0].entries())} == {"there", "c"}
    assert parts_of(where, {}, {})[0].last_used == before.last_used


@pytest.mark.parametrize("used", ["NaN", "1e40", "-1e40", "-Infinity", "4e9"])
def test_a_registration_by_a_clock_that_was_wrong_counts_from_when_it_was_written(where, monkeypatch, used):
    store = Store([where], REFERENCE)
    store.publish([scored(1)])
    store.places[0].write("runs/x.json", f'{{"host": "h", "directory": "/r", "used": {used}}}'.encode())
    days_pass(monkeypatch, 60)
    (part,) = parts_of(where, {}, {})
    assert abs(part.last_used - NOW) < DAY
    stage.gc(where, Rules(quota=0, even_used=True), apply=False)


def test_what_is_unused_is_named_and_deleted_on_demand(where, monkeypatch, capsys, tmp_path):
    Store([where], REFERENCE).publish([scored(1)])
    days_pass(monkeypatch, 3)
    stage.gc(where, Rules(), apply=True)
    assert "--unreferenced deletes it" in capsys.readouterr().out
    assert len(references(where)) == 1
    size = sum(entry.bytes for entry in Store([where], REFERENCE).places[0].entries())
    stage.gc(where, Rules(unreferenced=True), apply=False)
    said = capsys.readouterr().out
    assert f"used by no run: 2 files, {size:,} bytes in {Store([where], REFERENCE).places[0].name}" in said
    assert f"--apply removes 2 files of {size:,} bytes" in said
    assert len(references(where)) == 1
    stage.gc(where, Rules(unreferenced=True), apply=True)
    assert f"removed 2 files of {size:,} bytes" in capsys.readouterr().out
    assert Store([where], REFERENCE).places[0].entries() == []


def two_references(where, monkeypatch, tmp_path):
    """REFERENCE was last used 60 days ago by a run that is still there, OTHER 20 days ago by one that is gone."""
    run = tmp_path / "long ago"
    run.mkdir()
    for identity, ago, name in ((REFERENCE, 60, run), (OTHER, 20, tmp_path / "gone")):
        store = Store([where], identity)
        for number in range(4):
            store.publish([scored(10 * ago + number, length=200)])
        days_pass(monkeypatch, 100 - ago)
        store.register(name)
    days_pass(monkeypatch, 100)


def test_what_was_not_used_within_a_time_goes(where, monkeypatch, tmp_path, capsys):
    two_references(where, monkeypatch, tmp_path)
    assert goes(where, Rules(within=70 * DAY)) == {}
    assert list(goes(where, Rules(within=30 * DAY))) == [REFERENCE.reference_id]
    assert len(goes(where, Rules(within=10 * DAY))) == 2
    stage.gc(where, Rules(within=30 * DAY), apply=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "not used since" in said
    assert "(by long ago)" in said
    # a run here that used it within the time
    recent = registrations.time.time() - 10 * DAY
    stamp = retention.datetime.fromtimestamp(recent, retention.UTC).isoformat()
    used, last = {REFERENCE.reference_id: ["r"]}, {REFERENCE.reference_id: stamp}
    assert goes(where, Rules(within=30 * DAY), used, last) == {}


def test_what_is_younger_than_a_day_never_goes(where):
    Store([where], REFERENCE).publish([scored(1)])
    for rules in (Rules(within=0.0), Rules(unreferenced=True), Rules(quota=0, even_used=True)):
        assert goes(where, rules) == {}


def test_a_quota_takes_what_was_used_least_recently_and_no_more(where, monkeypatch, tmp_path, capsys):
    two_references(where, monkeypatch, tmp_path)
    parts = parts_of(where, {}, {})
    total = retention.bytes_of(parts)
    of = {part.reference_id: retention.bytes_of([part]) for part in parts}
    assert goes(where, Rules(quota=total)) == {}
    # a run is there that may need the older one; the run of the other is gone
    (taken,) = goes(where, Rules(quota=total - 1)).items()
    assert taken == (OTHER.reference_id, [min(shard_entries(entries_of(parts, OTHER)), key=age).name])
    assert goes(where, Rules(quota=0)).keys() == {OTHER.reference_id}
    assert list(goes(where, Rules(quota=0, even_used=True))) == [REFERENCE.reference_id, OTHER.reference_id]
    # within a time, it counts alone when a run used it
    (taken,) = goes(where, Rules(quota=total - of[REFERENCE.reference_id], within=70 * DAY, even_used=True)).items()
    assert taken == (REFERENCE.reference_id, [entry.name for entry in entries_of(parts, REFERENCE)])
    assert goes(where, Rules(quota=0, within=70 * DAY)) == {}
    stage.gc(where, Rules(quota=0, within=70 * DAY), apply=True)
    assert f"exceeded by {total:,} bytes of what stays, as it is in use" in " ".join(capsys.readouterr().out.split())
    assert len(references(where)) == 2


def test_what_was_published_first_goes_first(tmp_path, monkeypatch):
    store = Store([str(tmp_path)], REFERENCE)
    for number in range(6):
        store.publish([scored(number)])
    named = shards(store)
    order = [named[number] for number in (3, 0, 5, 1, 4, 2)]
    for days, name in enumerate(order):
        os.utime(tmp_path / REFERENCE.reference_id / name, (NOW - (30 - days) * DAY,) * 2)
    os.utime(tmp_path / REFERENCE.reference_id / "reference.json", (NOW - 20 * DAY,) * 2)
    (part,) = parts_of(str(tmp_path), {}, {})
    size = sum(entry.bytes for entry in shard_entries(part.entries) if entry.name in order[:2])
    gone = goes(str(tmp_path), Rules(quota=retention.bytes_of([part]) - size))
    assert gone == {REFERENCE.reference_id: order[:2]}


def entries_of(parts, identity):
    return next(part.entries for part in parts if part.reference_id == identity.reference_id)


def age(entry):
    return entry.changed, entry.name


def test_without_the_right_to_delete_gc_says_so(bucket, monkeypatch, capsys):  # noqa: F811
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    days_pass(monkeypatch, 3)
    refused(monkeypatch, store, "rm_file")  # fsspec hands the same object to all
    stage.gc(bucket, Rules(unreferenced=True), apply=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "cannot be tidied whole" in said
    assert "Access Denied" in said
    assert "removed" not in said.replace("cannot be removed", "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12h", 12 * 3600), ("30d", 30 * DAY), ("1.5 w", 10.5 * DAY), ("30", None), ("x", None), ("3y", None)],
)
def test_lengths_of_time(text, seconds):
    if seconds is not None:
        assert seconds_in(text) == seconds
        return
    with pytest.raises(ConfigError, match=f"'{text}' is not a length of time: give hours, days or weeks"):
        seconds_in(text)


@pytest.mark.parametrize(
    ("text", "size"), [("500GB", 5 * 10**11), ("2 TiB", 2**41), ("1.5mb", 1_500_000), ("-1GB", None)]
)
def test_sizes(text, size):
    if size is not None:
        assert bytes_in(text) == size
        return
    with pytest.raises(ConfigError, match="is not a size"):
        bytes_in(text)


# --- merging ---


def publish_in_order(store, count, per=3):
    """Shards that were published one after the other, in an order that neither their names nor their keys follow."""
    rows = [scored(number) for number in range(count * per)]
    for number in range(count):
        store.publish(rows[number * per : (number + 1) * per])
    return rows


def test_merging_keeps_the_order_of_arrival(where):
    store = Store([where], REFERENCE)
    rows = publish_in_order(store, 6)
    assert [(shards, rows) for shards, rows in compact_small(store, store.places[0].entries())] == [(6, 18)]
    (name,) = shards(store)
    with store.places[0].open(name) as file:
        table = pq.read_table(file)
    assert table["key"].to_pylist() == [row.key for row in rows]
    assert not [name for name in names(store) if name.startswith((FOLDER, durable.TEMPORARY))]
    for row in rows:
        assert values(Store([where], REFERENCE), row) == row.logps.tolist()
    # and once more, with what came later
    store.publish([scored(100)])
    assert [rows for _, rows in compact_small(store, store.places[0].entries())] == [19]
    (name,) = shards(store)
    with store.places[0].open(name) as file:
        assert pq.read_table(file)["key"].to_pylist() == [row.key for row in [*rows, scored(100)]]
    assert list(compact_small(store, store.places[0].entries())) == []


def test_groups_are_of_neighbours_in_time_and_no_larger_than_they_may(where, monkeypatch):
    store = Store([where], REFERENCE)
    publish_in_order(store, 6)
    size = max(entry.bytes for entry in shard_entries(store.places[0].entries()))
    monkeypatch.setattr(compaction, "MERGED_BYTES", 2 * size)
    groups = groups_of(store.places[0], store.places[0].entries())
    with_times = {name: pq_about(store, name)["published"] for group in groups for name in group}
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [name for group in groups for name in group] == sorted(with_times, key=with_times.get)
    monkeypatch.setattr(compaction, "MERGED_BYTES", 2**40)
    monkeypatch.setattr(compaction, "MERGED_ROWS", 10)
    assert [len(group) for group in groups_of(store.places[0], store.places[0].entries())] == [3, 3]
    monkeypatch.setattr(compaction, "MERGED_ROWS", 2**40)
    monkeypatch.setattr(compaction, "MERGED_SHARDS", 4)
    assert [len(group) for group in groups_of(store.places[0], store.places[0].entries())] == [4, 2]
    monkeypatch.setattr(compaction, "SMALL_BYTES", 10)
    assert groups_of(store.places[0], store.places[0].entries()) == []


def pq_about(store, name):
    with store.places[0].open(name) as file:
        return json.loads(pq.read_schema(file).metadata[b"refscore"])


def test_what_says_something_else_of_itself_is_merged_apart(where):
    store = Store([where], REFERENCE)
    rows = [scored(number) for number in range(4)]
    store.publish(rows[:1])
    for number in (1, 2):
        table = table_of([rows[number]])
        store.publish_parts(lambda table=table: iter([table]), {**about(store), "computed_by": "another"}, 1)
    store.publish(rows[3:])
    assert [count for count, _ in compact_small(store, store.places[0].entries())] == [2, 2]
    assert sorted(pq_about(store, name).get("computed_by", "") for name in shards(store)) == ["", "another"]
    assert len(Store([where], REFERENCE).lookup(keys(*rows)).held) == 4


def about(store):
    return {
        "reference_id": store.reference.reference_id,
        "published": registrations.time.time_ns(),
        "circumstances": [],
    }


def table_of(rows):
    from pipeline.store.store import _table

    return _table(rows)


def test_of_two_scores_of_a_key_the_first_published_counts_after_any_merge(where):
    store = Store([where], REFERENCE)
    first = scored(1)
    second = Scored(first.key, first.prompt_tokens, first.logps - 1)
    # published late, named early or late: the clock decides
    store.publish_table(table_of([second, scored(2)]), published=200)
    store.publish_table(table_of([first, scored(3)]), published=100)
    store.publish_table(table_of([scored(4)]), published=50)
    store.publish_table(table_of([scored(5)]), published=300)
    oldest, holder, other, newest = sorted(shards(store), key=lambda name: pq_about(store, name)["published"])
    # the later one is merged with an earlier one that has not the key: it does not get its rank by it
    assert compact(store, [oldest, other]) == 2
    assert values(Store([where], REFERENCE), first) == first.logps.tolist()
    # nor does the earlier one lose its rank to one that was published after both
    store.publish_table(table_of([second]), published=150)
    assert compact(store, [holder, newest]) == 3
    assert values(Store([where], REFERENCE), first) == first.logps.tolist()
    assert compact(store, shards(store)) == 5
    assert values(Store([where], REFERENCE), first) == first.logps.tolist()


def test_damaged_shards_are_set_aside_and_the_others_merged(where):
    store = Store([where], REFERENCE)
    rows = publish_in_order(store, 3, per=1)
    damaged = next(name for name in shards(store) if pq_about(store, name)["published"] == published_last(store))
    damage(store, damaged)
    assert [rows for _, rows in compact_small(store, store.places[0].entries())] == [2]
    assert f"corrupt/{damaged}" in names(store)
    assert Store([where], REFERENCE).lookup(keys(*rows)).missing.tolist() == [2]


def published_last(store):
    return max(pq_about(store, name)["published"] for name in shards(store))


def test_memory_holds_a_row_group_and_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.artifacts.tables._AT_ONCE", 5)
    store = Store([str(tmp_path)], REFERENCE)
    rows = publish_in_order(store, 5, per=7)
    seen = []
    parts = compaction._parts
    monkeypatch.setattr(
        compaction, "_parts", lambda shards, kept: (seen.append(len(part)) or part for part in parts(shards, kept))
    )
    assert compact(store, shards(store)) == 35
    # once to be written, once to be compared
    assert seen == [5, 2] * 10
    with pq.ParquetFile(store.places[0].directory / shards(store)[0]) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [5] * 7
    assert len(store.lookup(keys(*rows)).held) == 35


def test_what_another_process_claims_is_left_to_it(where):
    store = Store([where], REFERENCE)
    publish_in_order(store, 4)
    place = store.places[0]
    (group,) = groups_of(place, place.entries())
    with claiming(place, group[:2]) as ours:
        assert ours
        assert claimed(place, place.entries()) == set(group[:2])
        assert groups_of(place, place.entries()) == [group[2:]]
        with claiming(place, group[:2]) as again:
            assert not again
    assert claimed(place, place.entries()) == set()
    # one that begins between the listing and the work
    work = compact_small(store, place.entries())
    with claiming(place, group):
        assert list(work) == [(4, None)]
    assert len(shards(store)) == 4


CLAIMING = """
import sys
from pipeline.store.tidying import compaction, retention
from pipeline.store.tidying.claims import claiming
from pipeline.store.local_places import LocalPlace
from pathlib import Path
with claiming(LocalPlace(Path(sys.argv[1])), ["a", "b"]):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("ended", ["killed", "elsewhere"])
def test_a_claim_whose_process_is_gone_counts_no_longer(tmp_path, ended, monkeypatch):
    place = Store([str(tmp_path)], REFERENCE).places[0]
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIMING, str(place.directory)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"claimed\n"
    assert claimed(place, place.entries()) == {"a", "b"}
    process.kill()
    process.communicate()
    if ended == "elsewhere":
        # of another machine nobody knows; but not for ever
        monkeypatch.setattr(durable, "machine", lambda: "another")
        assert claimed(place, place.entries()) == {"a", "b"}
        days_pass(monkeypatch, 0.1)
    assert claimed(place, place.entries()) == set()
    assert len(place.entries()) == 1  # who looks removes nothing
    sweep(place, place.entries())
    assert place.entries() == []


def test_a_group_that_a_dead_process_claimed_is_merged(where, monkeypatch):
    store = Store([where], REFERENCE)
    publish_in_order(store, 3)
    (group,) = groups_of(store.places[0], store.places[0].entries())
    with monkeypatch.context() as patch:
        patch.setattr(type(store.places[0]), "remove", lambda *_: None)  # killed before it could
        with claiming(store.places[0], group) as ours:
            assert ours
    assert list(compact_small(store, store.places[0].entries())) == []  # this process lives
    (claim,) = [name for name in names(store) if name.startswith(FOLDER)]
    store.places[0].write(claim, store.places[0].read(claim).replace(b"%d" % os.getpid(), b"%d" % (2**22 + 1)))
    assert [rows for _, rows in compact_small(store, store.places[0].entries())] == [9]
    assert not [name for name in names(store) if name.startswith(FOLDER)]


def test_without_apply_nothing_changes_whatever_could_go(where, monkeypatch):
    store = Store([where], REFERENCE)
    publish_in_order(store, 3)
    damage(store, shards(store)[0])
    for name in (f"{FOLDER}x.json", "corrupt/scores-x.parquet", f"{durable.TEMPORARY}1-scores.parquet"):
        store.places[0].write(name, b"half")
    dead = {"machine": durable.machine(), "pid": 2**22 + 1, "names": ["a"]}
    store.places[0].write(f"{FOLDER}dead.json", json.dumps(dead).encode())
    days_pass(monkeypatch, 5)
    before = [(entry.name, entry.bytes, store.places[0].read(entry.name)) for entry in store.places[0].entries()]
    for rules in (Rules(), Rules(unreferenced=True), Rules(within=0.0), Rules(quota=0, even_used=True)):
        stage.gc(where, rules, apply=False)
    assert [
        (entry.name, entry.bytes, store.places[0].read(entry.name)) for entry in store.places[0].entries()
    ] == before


def test_what_is_set_aside_stays_for_a_day_however_old_it_was(tmp_path):
    store = Store([str(tmp_path)], REFERENCE)
    store.publish([scored(1)])
    (name,) = shards(store)
    damage(store, name)
    os.utime(tmp_path / REFERENCE.reference_id / name, (NOW - 30 * DAY, NOW - 30 * DAY))
    assert store.places[0].set_aside(name)
    assert goes(str(tmp_path)) == {}


def test_a_claim_that_nobody_can_read_is_of_nothing(where):
    place = Store([where], REFERENCE).places[0]
    for number, content in enumerate((b"", b"[]", b'{"machine": 1}', b"\xff")):
        place.write(f"{FOLDER}{number}.json", content)
    assert claimed(place, place.entries()) == set()


def test_where_nothing_can_be_removed_nothing_is_merged(bucket, monkeypatch):  # noqa: F811
    store = Store([bucket], REFERENCE)
    publish_in_order(store, 3)
    refused(monkeypatch, store, "rm_file")
    with pytest.raises(RefscoreError, match=r"not merged where the small ones cannot be removed.*Access Denied"):
        list(compact_small(store, store.places[0].entries()))
    assert len(shards(store)) == 3


def test_a_reference_that_cannot_be_merged_keeps_no_other_from_it(where, monkeypatch, capsys):
    stores = [Store([where], one) for one in sorted((REFERENCE, OTHER), key=lambda one: one.reference_id)]
    for store in stores:
        publish_in_order(store, 2)
    place, write = type(stores[0].places[0]), type(stores[0].places[0]).write

    def refuse(self, name, content):
        if self.name == stores[0].places[0].name:
            raise RefscoreError("it may not be written")
        write(self, name, content)

    monkeypatch.setattr(place, "write", refuse)
    for command in (lambda: stage.compact(where), lambda: stage.gc(where, Rules(), apply=True)):
        with pytest.raises(RefscoreError, match="of 1 references could not be merged"):
            command()
        assert "not merged: it may not be written" in capsys.readouterr().out
        assert [len(shards(store)) for store in stores] == [2, 1]


def test_a_directory_that_is_described_as_another_is_not_merged(where, capsys):
    store = Store([where], REFERENCE)
    publish_in_order(store, 2)
    store.places[0].write("reference.json", json.dumps(OTHER.described()).encode())
    with pytest.raises(RefscoreError, match="does not describe this directory"):
        identified(where, REFERENCE.reference_id)
    stage.compact(where)
    assert "not merged" in capsys.readouterr().out
    assert len(shards(store)) == 2


COMPACTING = """
import sys
from pipeline.store.tidying import compaction
from pipeline.store.tidying.compaction import compact_small
from tests.store.test_store import REFERENCE
from pipeline.store.store import Store
compaction.MERGED_BYTES = int(sys.argv[2])
store = Store([sys.argv[1]], REFERENCE)
for shards, rows in compact_small(store, store.places[0].entries()):
    print(rows, flush=True)
"""


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_processes_share_the_merging_and_nothing_is_lost(kind, request, tmp_path):
    where = str(tmp_path / "store") if kind == "directory" else request.getfixturevalue("bucket")
    store = Store([where], REFERENCE)
    rows = publish_in_order(store, 24, per=2)
    size = sum(entry.bytes for entry in store.places[0].entries())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMPACTING, where, str(size // 6)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for _ in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    # who comes while another removes what it has merged may find some shards left, whose rows stand elsewhere
    merged = [int(line) for out, _ in said for line in out.split() if line not in ("None", "0")]
    # and who comes late may merge merged ones, which are small too
    assert sum(merged) >= len(rows)
    assert len(shards(store)) <= len(merged) < 24
    found = Store([where], REFERENCE).lookup(keys(*rows)).found()
    assert sorted(found["key"].to_list()) == sorted(row.key for row in rows)
    assert not [name for name in names(store) if name.startswith(FOLDER)]
    assert np.isfinite(found["logp"].to_numpy()).all()
    assert SCORES.names == found.columns
