"""What gc names and deletes, at a directory and at a bucket, and what it spares as somebody needs it."""

import dataclasses
import os

import pytest

from pipeline.artifacts import durable
from pipeline.errors import ConfigError
from pipeline.store import registrations
from pipeline.store.registrations import DAY, registered
from pipeline.store.store import Store
from pipeline.store.tidying import retention
from pipeline.store.tidying.claims import FOLDER
from pipeline.store.tidying.inventory import references, shard_entries
from pipeline.store.tidying.retention import Rules, bytes_in, parts_of, removals_by, remove, seconds_in
from stages import store as stage
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE, keys, scored
from tests.store.tidied import NOW, OTHER, days_pass, goes, names, refused, shards


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
