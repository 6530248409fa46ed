"""Scores that one publishes and another fetches: the same rows, the same order of precedence, and nothing that is not sound."""

import dataclasses
import json

import pytest

from pipeline.errors import ConfigError, DataError, RefscoreError
from pipeline.store.lookup import Lookup
from pipeline.store.places import LocalPlace
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
    assert "--config" in refscore_here(user, "store", "pull", tmp_path / "published", "--set", "a.b=1", code=2)
