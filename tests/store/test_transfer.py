"""Scores that one publishes and another fetches: the same rows, the same order of precedence, and nothing that is not sound."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import write_parquet
from pipeline.errors import ConfigError, DataError, RefscoreError
from pipeline.store import transfer
from pipeline.store.local_places import LocalPlace
from pipeline.store.lookup import Lookup
from pipeline.store.shard import open_shard, published_at, shard_files
from pipeline.store.store import Store
from pipeline.store.transfer import copy_rows, copy_shards, described_references
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE, keys, scored

ROWS = [scored(n) for n in range(12)]
OTHER = dataclasses.replace(REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, dtype="bfloat16"))


@pytest.fixture
def source(tmp_path):
    store = str(tmp_path / "source")
    for part in (ROWS[:4], ROWS[4:8], ROWS[8:]):
        Store([store], REFERENCE).publish(part, {"machine": f"m{part[0].prompt_tokens}"})
    Store([store], OTHER).publish(ROWS[:2])
    return store


def found(place, rows=ROWS, reference=REFERENCE):
    return Store([place], reference).lookup(keys(*rows)).found().sort("key")


def test_a_place_says_which_references_it_holds(source, tmp_path):
    assert described_references(source) == {found.reference_id: found for found in (REFERENCE, OTHER)}
    (tmp_path / "source" / ("0" * 64)).mkdir()
    (tmp_path / "source" / ("1" * 64)).mkdir()
    (tmp_path / "source" / ("1" * 64) / "reference.json").write_text(json.dumps(OTHER.described()))
    assert len(described_references(source)) == 2
    with pytest.raises(DataError, match="does not exist"):
        described_references(str(tmp_path / "none"))


def test_a_whole_store_is_copied_once(source, tmp_path):
    target = str(tmp_path / "target")
    identities = list(described_references(source).values())
    copies = copy_shards(source, target, identities)
    assert sorted((copied.shards, copied.rows, copied.there) for copied in copies) == [(1, 2, 0), (3, 12, 0)]
    assert found(target).equals(found(source))
    assert found(target, ROWS[:2], OTHER).equals(found(source, ROWS[:2], OTHER))
    again = copy_shards(source, target, identities)
    assert sorted((copied.shards, copied.rows, copied.there) for copied in again) == [(0, 0, 1), (0, 0, 3)]
    # nothing temporary is left, and no file is shared: damage in one store is none in the other
    assert not list((tmp_path / "target").rglob(".tmp*"))
    for shard in shard_files(tmp_path / "target" / REFERENCE.reference_id):
        assert shard.stat().st_nlink == 1


def test_the_rows_that_are_needed_and_only_these(source, tmp_path):
    target = str(tmp_path / "target")
    wanted = [*ROWS[2:6], scored(99)]
    Store([target], REFERENCE).publish(ROWS[2:3])
    copied = copy_rows(keys(*wanted), source, target, REFERENCE)
    assert (copied.rows, copied.there, copied.shards) == (3, 1, 2)
    assert found(target)["key"].to_list() == sorted(row.key for row in ROWS[2:6])
    assert Store([target], REFERENCE).lookup(keys(*wanted)).missing.tolist() == [4]
    assert copy_rows(keys(*wanted), source, target, REFERENCE).rows == 0


def test_a_copy_keeps_when_its_rows_were_published(source, tmp_path):
    """Of a key that stands twice the first published counts, wherever it is read."""
    target = str(tmp_path / "target")
    copy_rows(keys(*ROWS[:2]), source, target, REFERENCE)

    def first(place):
        times = []
        for shard in shard_files(tmp_path / place / REFERENCE.reference_id):
            with open_shard(shard) as file:
                times.append(published_at(file))
        return min(times)

    assert first("target") == first("source")


def test_a_key_that_stands_twice_is_copied_once(source, tmp_path):
    Store([source], REFERENCE).publish([*ROWS[:1], scored(50)])
    copied = copy_rows(keys(*ROWS), source, str(tmp_path / "target"), REFERENCE)
    assert copied.rows == len(ROWS)


def test_a_damaged_shard_is_not_copied(source, tmp_path):
    shard = shard_files(tmp_path / "source" / REFERENCE.reference_id)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    copied = copy_shards(source, str(tmp_path / "target"), [REFERENCE])[0]
    assert copied.shards == 2
    assert len(Lookup([LocalPlace(tmp_path / "target" / REFERENCE.reference_id)], keys(*ROWS)).held) == 8


def test_a_shard_that_changes_while_it_is_copied_is_not_published(source, tmp_path, monkeypatch):
    copy = transfer.shutil.copyfile

    def changed(shard, temporary):
        copy(shard, temporary)
        with temporary.open("r+b") as file:
            file.seek(100)
            file.write(b"?")

    monkeypatch.setattr(transfer.shutil, "copyfile", changed)
    target = str(tmp_path / "target")
    (copied,) = copy_shards(source, target, [REFERENCE])
    assert (copied.shards, set(copied.unsound.values())) == (0, {"it changed while it was copied"})
    assert not list(Path(target).rglob("scores-*"))


def planted(tmp_path, table=None, content=b"", about=None):
    """A shard at the source whose name promises the bytes that it has, whatever these are."""
    shard = tmp_path / "planted.parquet"
    shard.write_bytes(content)
    if table is not None:
        write_parquet(shard, table, about)
    name = f"scores-{hashlib.sha256(shard.read_bytes()).hexdigest()}.parquet"
    return shard.rename(tmp_path / "source" / REFERENCE.reference_id / name)


def impossible(source, rows=ROWS[:1]):
    """Rows whose probabilities are above one."""
    there = found(source, rows).to_arrow().cast(SCORES).to_pylist()
    raised = [{**row, "logps": [5.0] * len(row["logps"]), "logp": 5.0 * len(row["logps"])} for row in there]
    return pa.Table.from_pylist(raised, schema=SCORES)


def test_what_is_not_sound_is_never_published(source, tmp_path):
    """Neither garbage nor scores that cannot be true, although their bytes are what their names promise."""
    bad = {planted(tmp_path, impossible(source)).name, planted(tmp_path, content=b"garbage").name}
    target = tmp_path / "target"
    for _ in range(2):
        copied = copy_shards(source, str(target), [REFERENCE])[0]
        assert set(copied.unsound) == bad
        assert "above 0" in " ".join(copied.unsound.values())
        assert {shard.name for shard in shard_files(target / REFERENCE.reference_id)}.isdisjoint(bad)
    assert (copied.shards, copied.there) == (0, 3)
    assert len(found(str(target))) == len(ROWS)
    assert not list(target.rglob(".tmp*"))


def test_rows_are_not_taken_from_an_unsound_shard(source, tmp_path):
    rows = [scored(77)]
    Store([source], REFERENCE).publish(rows)
    table = impossible(source, rows)
    for shard in shard_files(tmp_path / "source" / REFERENCE.reference_id):
        if rows[0].key in pq.read_table(shard)["key"].to_pylist():
            shard.unlink()
    bad = {planted(tmp_path, content=b"garbage").name, planted(tmp_path, table).name}
    copied = copy_rows(keys(*rows, *ROWS), source, str(tmp_path / "target"), REFERENCE)
    assert set(copied.unsound) == bad
    assert copied.rows == len(ROWS)


def test_an_unsound_shard_is_named_by_the_command(source, tmp_path):
    bad = planted(tmp_path, content=b"garbage").name
    said = refscore_here(tmp_path, "store", "push", "target", "--store", source, code=4)
    assert f"left out  {bad}" in said
    assert "1 shards in" in said
    assert "copied    12 sequences" in said


def test_a_shard_damaged_at_the_target_is_copied_again(source, tmp_path):
    target = str(tmp_path / "target")
    copy_shards(source, target, [REFERENCE])
    shard_files(tmp_path / "target" / REFERENCE.reference_id)[0].write_bytes(b"x")
    assert copy_shards(source, target, [REFERENCE])[0].shards == 1
    assert len(found(target)) == len(ROWS)


@pytest.mark.parametrize("said", [5, ["ab c"], [{"machine": "m"}, 5], None])
def test_whatever_a_shard_says_of_itself_its_rows_are_copied(source, tmp_path, said):
    rows = [scored(88)]
    Store([str(tmp_path / "elsewhere")], REFERENCE).publish(rows)
    table = found(str(tmp_path / "elsewhere"), rows).to_arrow().cast(SCORES)
    planted(tmp_path, table, about={"circumstances": said, "published": "never"})
    assert copy_rows(keys(*rows), source, str(tmp_path / "target"), REFERENCE).rows == 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_description_that_cannot_be_read_keeps_no_other_from_being_copied(source, tmp_path, content, caplog):
    (tmp_path / "source" / OTHER.reference_id / "reference.json").write_bytes(content)
    assert set(described_references(source)) == {REFERENCE.reference_id}
    assert f"{OTHER.reference_id}/reference.json cannot be read" in caplog.text


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        described_references(str(tmp_path / "file"))
    assert "is a file" in refscore_here(tmp_path, "store", "pull", "file", code=3)


def test_no_shard_is_read_for_rows_that_are_there(source, tmp_path, monkeypatch):
    from pipeline.store import transfer

    target, read = str(tmp_path / "target"), []
    read_one = transfer._read
    monkeypatch.setattr(transfer, "_read", lambda shard: read.append(shard) or read_one(shard))
    copy_rows(keys(*ROWS[:2]), source, target, REFERENCE)
    # by name, not by age: no more than it takes until the rows are found
    assert 1 <= len(read) <= 3
    first = shard_files(tmp_path / "source" / REFERENCE.reference_id)[0]
    in_first = [row for row in ROWS if row.key in set(pq.read_table(first)["key"].to_pylist())]
    read.clear()
    copy_rows(keys(*in_first), source, str(tmp_path / "another"), REFERENCE)
    assert read == [first]
    read.clear()
    assert copy_rows(keys(*ROWS[:2]), source, target, REFERENCE).there == 2
    assert not read


def test_copying_rows_shows_how_far_it_is(source, tmp_path):
    class Heard:
        titles = ()

        def progress(self, title, total, done=0):
            from pipeline.progress import SILENT

            self.titles += ((title, total),)
            return SILENT.progress(title, total, done)

    heard = Heard()
    copy_rows(keys(*ROWS), source, str(tmp_path / "target"), REFERENCE, heard)
    assert heard.titles == ((f"{REFERENCE.reference_id[:12]} shards", 3),)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/s", "hf://datasets/me/x", "ftp://127.0.0.1:9/s"])
def test_a_place_out_of_reach_is_a_message_both_ways(source, tmp_path, url, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    tries = (
        lambda: copy_shards(source, url, [REFERENCE]),
        lambda: copy_rows(keys(*ROWS), source, url, REFERENCE),
        lambda: described_references(url),
    )
    for attempt in tries:
        with pytest.raises(RefscoreError, match=r"cannot be (listed|reached) .*network"):
            attempt()


def test_to_a_bucket_and_back(source, tmp_path, bucket):  # noqa: F811
    identities = list(described_references(source).values())
    assert sum(copied.rows for copied in copy_shards(source, bucket, identities)) == 14
    assert sum(copied.shards for copied in copy_shards(source, bucket, identities)) == 0
    assert set(described_references(bucket)) == {REFERENCE.reference_id, OTHER.reference_id}
    back = str(tmp_path / "back")
    copy_rows(keys(*ROWS[:5]), bucket, back, REFERENCE)
    assert found(back).equals(found(source, ROWS[:5]))


def test_a_place_that_cannot_be_reached_is_named():
    with pytest.raises(ConfigError, match="nosuch://x"):
        described_references("nosuch://x")


def test_a_full_disk_leaves_nothing_behind(source, tmp_path, monkeypatch):
    from pipeline.store import transfer

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer.shutil, "copyfile", full)
    with pytest.raises(RefscoreError, match=r"full|space"):
        copy_shards(source, str(tmp_path / "target"), [REFERENCE])
    assert not [path for path in (tmp_path / "target").rglob("*") if path.is_file() and path.name != "reference.json"]


def test_a_lab_publishes_scores_and_a_user_scores_nothing(tiny_model, tmp_path):
    """The README's promise: the user's data overlaps with the lab's, and what overlaps is fetched, not scored."""
    lab, user = tmp_path / "lab", tmp_path / "user"
    for where, rows in ((lab, preference_rows(12)), (user, preference_rows(10))):
        where.mkdir()
        data = write_rows(where / "preferences.jsonl", rows)
        experiment(where, tiny_model, data)
    refscore_here(lab, "precompute", "--config", "experiment.yaml", "--run", "r")
    said = refscore_here(lab, "store", "push", tmp_path / "published")
    assert "copied    24 sequences" in said
    said = refscore_here(user, "store", "pull", tmp_path / "published", "--config", "experiment.yaml")
    assert "needed    20 sequences" in said
    assert "copied    20 sequences" in said
    said = refscore_here(user, "precompute", "--config", "experiment.yaml", "--run", "r")
    assert "20 hits, 0 misses" in said
    # another dtype is another reference: said, with what there is
    said = refscore_here(
        user, "store", "pull", tmp_path / "published", "--config", "experiment.yaml", "--set", "reference.dtype=bfloat16", code=3,
    )  # fmt: skip
    assert "holds nothing of reference" in said
    assert "bfloat16" in said
    # a configuration's own store is the one that is filled, and read
    own = ("--config", "experiment.yaml", "--set", "reference.store=mine")
    said = refscore_here(user, "store", "pull", tmp_path / "published", *own)
    assert "to        mine" in said
    assert "20 hits, 0 misses" in refscore_here(user, "precompute", *own, "--plan")
    said = refscore_here(user, "store", "push", tmp_path / "more", *own)
    assert "from      mine" in said
    assert "copied    20 sequences" in said
    assert "to        elsewhere" in refscore_here(
        user, "store", "pull", tmp_path / "published", *own, "--store", "elsewhere"
    )
    assert "--config" in refscore_here(user, "store", "pull", tmp_path / "published", "--set", "a.b=1", code=2)
