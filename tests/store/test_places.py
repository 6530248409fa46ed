"""What can go wrong with a place of a store: it heals, or it is said what to do; never a traceback, never for ever."""

import errno
import os

import pytest

from pipeline.errors import CheckError, RefscoreError
from pipeline.store import local_places, places, registrations
from pipeline.store.shard import sha256_now, shard_files
from pipeline.store.store import Scored, Store
from pipeline.store.tidying.compaction import compact
from pipeline.store.tidying.retention import Rules, parts_of, removals_by
from tests.store.test_store import REFERENCE, keys, scored


@pytest.fixture
def store(tmp_path):
    return Store([str(tmp_path / "store")], REFERENCE)


def directory(store):
    return store.places[0].directory


def names(store):
    return [shard.name for shard in shard_files(directory(store))]


def unused(store, used=()):
    """The references that go if what no run uses goes."""
    parts = parts_of(str(directory(store).parent), {name: ["a run"] for name in used}, {})
    return [removal.part.reference_id for removal in removals_by(Rules(unreferenced=True), parts)[0]]


def table_of(store, *rows):
    from pipeline.artifacts.schemas import SCORES

    return store.lookup(keys(*rows)).found().to_arrow().cast(SCORES)


@pytest.mark.parametrize("holder", ["damaged", "a link to nothing"])
def test_a_damaged_holder_of_a_name_is_replaced_by_the_sound_copy(store, tmp_path, holder):
    store.publish([scored(1)])
    table = table_of(store, scored(1))
    (first,) = shard_files(directory(store))
    name = store.publish_table(table, published=7)
    first.unlink()
    shard = directory(store) / name
    sound = shard.read_bytes()
    shard.unlink()
    if holder == "damaged":
        shard.write_bytes(sound[:50] + b"?" + sound[51:])
    else:
        shard.symlink_to(tmp_path / "nowhere")
    assert store.publish_table(table, published=7) == name
    assert sha256_now(shard) in name
    assert store.lookup(keys(scored(1))).held.tolist() == [0]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_takes_copies(store, monkeypatch, refusal):
    def link(*_):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(local_places.os, "link", link)
    store.publish([scored(1)])
    assert store.lookup(keys(scored(1))).held.tolist() == [0]
    assert not list(directory(store).glob(".tmp-*"))


def test_an_error_without_a_number_is_a_message(store, monkeypatch):
    def link(*_):
        raise OSError("the device went away")

    monkeypatch.setattr(local_places.os, "link", link)
    with pytest.raises(RefscoreError, match="the device went away"):
        store.publish([scored(1)])


def test_a_temporary_file_that_somebody_sweeps_is_written_again(store, monkeypatch):
    link, swept = os.link, []

    def sweeping(file, final):
        if str(final).endswith(".parquet") and not swept:
            swept.append(file)
            file.unlink()
        link(file, final)

    monkeypatch.setattr(local_places.os, "link", sweeping)
    store.publish([scored(1)])
    assert swept
    assert store.lookup(keys(scored(1))).held.tolist() == [0]


def test_one_key_twice_is_not_published(store):
    row = scored(1)
    other = Scored(row.key, row.prompt_tokens, row.logps - 1)
    with pytest.raises(CheckError, match="two scores of one key"):
        store.publish([row, other])


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_scores_of_a_key_the_first_published_counts_before_and_after_a_compaction(store, first):
    row = scored(1)
    versions = [row, Scored(row.key, row.prompt_tokens, row.logps - 1)]
    for when, number in enumerate((first, 1 - first)):
        one = versions[number]
        elsewhere = Store([str(directory(store).parent.parent / f"s{number}")], REFERENCE)
        elsewhere.publish([one, scored(10 + number)])
        store.publish_table(table_of(elsewhere, one, scored(10 + number)), published=100 + when)
    store.publish_table(table_of(elsewhere, scored(10 + 1 - first)), published=102)

    def value():
        return store.lookup(keys(row)).found()["logps"][0].to_numpy().tolist()

    assert value() == versions[first].logps.tolist()
    # whichever shards are merged, the first stays first
    for _ in range(2):
        compact(store, names(store)[:2])
        assert value() == versions[first].logps.tolist()
    compact(store, names(store))
    assert value() == versions[first].logps.tolist()


def test_an_absent_place_is_empty_only_if_it_is_the_first_and_can_be_made(tmp_path):
    assert Store([str(tmp_path / "new")], REFERENCE).lookup(keys(scored(1))).missing.tolist() == [0]
    with pytest.raises(RefscoreError, match="does not exist"):
        Store([str(tmp_path / "new"), str(tmp_path / "unmounted")], REFERENCE).lookup(keys(scored(1)))
    (tmp_path / "file").write_text("")
    with pytest.raises(RefscoreError, match="no directory"):
        Store([str(tmp_path / "file")], REFERENCE).lookup(keys(scored(1)))


def test_a_place_that_cannot_be_listed_is_not_empty(store, monkeypatch):
    store.publish([scored(1)])
    monkeypatch.setattr(
        type(directory(store)), "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(errno.EACCES, "denied"))
    )
    with pytest.raises(RefscoreError, match="cannot be listed"):
        store.lookup(keys(scored(1)))


def test_a_file_that_is_listed_for_ever_and_never_there_is_an_error(store, monkeypatch):
    store.publish([scored(1)])
    ghost = directory(store) / f"scores-{'0' * 64}.parquet"
    waited = []
    monkeypatch.setattr(places.time, "sleep", waited.append)
    monkeypatch.setattr(local_places, "shard_names", lambda _: [ghost.name])
    with pytest.raises(RefscoreError, match="listed but cannot be read"):
        store.lookup(keys(scored(1)))
    assert waited == sorted(waited)
    assert len(waited) < 10


def test_a_sound_shard_is_never_set_aside_and_a_new_one_is_given_back(store, monkeypatch):
    store.publish([scored(1)])
    (shard,) = shard_files(directory(store))
    assert local_places.set_aside_if_damaged(shard) is None
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1])
    check = local_places.check_shard

    def published_anew_meanwhile(path):
        problem = check(path)
        if path == shard and problem:
            beside = shard.with_name(".tmp-anew")
            beside.write_bytes(sound)
            beside.replace(shard)
        return problem

    monkeypatch.setattr(local_places, "check_shard", published_anew_meanwhile)
    assert local_places.set_aside_if_damaged(shard) is None
    assert shard.read_bytes() == sound


def test_tidying_spares_what_is_young_and_what_others_registered(store, tmp_path, monkeypatch):
    store.publish([scored(1)])
    where = directory(store)
    assert unused(store) == []  # younger than a day
    later = registrations.time.time() + 3 * registrations.DAY
    run = tmp_path / "elsewhere" / "run"
    run.mkdir(parents=True)
    store.register(run)
    store.register(run)
    place = store.places[0]
    assert [one.name for one in registrations.registered(place, place.entries())] == ["run"]
    monkeypatch.setattr(registrations.time, "time", lambda: later)
    assert unused(store) == []  # the other checkout's run is there
    run.rmdir()
    assert unused(store) == [where.name]
    assert unused(store, {where.name}) == []


def test_what_cannot_be_read_in_a_store_is_said_by_ls_and_gc_and_not_raised(store, tmp_path, capsys, monkeypatch):
    from stages import store as stage

    store.publish([scored(1)])
    where = directory(store)
    (shard,) = shard_files(where)
    os.truncate(shard, 30)
    other = where.parent / ("1" * 64)
    other.mkdir()
    (other / "reference.json").write_text("{}")
    (where.parent / ("2" * 64)).symlink_to(where)
    stage.ls(str(where.parent))
    stage.gc(str(where.parent), Rules(unreferenced=True), apply=True)
    said = capsys.readouterr().out
    assert "1 shards cannot be read" in said
    assert "describes no reference" in said.replace("\n", " ")
    assert (where.parent / ("2" * 64)).is_symlink()


def test_a_reference_of_an_earlier_version_is_said_to_be_one(store, capsys):
    import json

    from stages import store as stage

    store.publish([scored(1)])
    file = directory(store) / "reference.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    stage.ls(str(directory(store).parent))
    assert "an identity of version 1" in " ".join(capsys.readouterr().out.split())


def test_shards_say_on_what_they_were_made(store):
    import json

    import pyarrow.parquet as pq

    store.publish([scored(1)], {"processor": "one"})
    store.publish([scored(2)], {"processor": "two"})
    compact(store, names(store))
    (shard,) = shard_files(directory(store))
    about = json.loads(pq.read_schema(shard).metadata[b"refscore"])
    assert about["circumstances"] == [{"processor": "one"}, {"processor": "two"}]
    assert isinstance(about["published"], int)


def test_entries_tell_of_what_links_lead_to(store, tmp_path):
    store.publish([scored(1)])
    (shard,) = shard_files(directory(store))
    elsewhere = tmp_path / "elsewhere.parquet"
    shard.rename(elsewhere)
    os.utime(elsewhere, (1000, 1000))
    shard.symlink_to(elsewhere)
    (directory(store) / f"scores-{'0' * 64}.parquet").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("not of this store")
    (directory(store) / "link").symlink_to(tmp_path / "folder")
    found = {entry.name: entry for entry in store.places[0].entries()}
    assert found.keys() == {"reference.json", shard.name}
    assert (found[shard.name].bytes, found[shard.name].changed) == (elsewhere.stat().st_size, 1000)
