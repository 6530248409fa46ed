"""Merging small shards, at a directory and at a bucket: the order of arrival stays, and nothing is lost."""

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
from pipeline.errors import RefscoreError
from pipeline.store import registrations
from pipeline.store.registrations import DAY
from pipeline.store.store import Scored, Store
from pipeline.store.tidying import compaction
from pipeline.store.tidying.claims import FOLDER, claimed, claiming, sweep
from pipeline.store.tidying.compaction import compact, compact_small, groups_of, identified
from pipeline.store.tidying.inventory import shard_entries
from pipeline.store.tidying.retention import Rules
from stages import store as stage
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE, keys, scored
from tests.store.tidied import NOW, OTHER, damage, days_pass, goes, names, refused, shards, values


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
