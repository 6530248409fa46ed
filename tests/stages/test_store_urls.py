"""The store's commands on a bucket, as they are typed."""

import json

import pytest

from pipeline.errors import RefscoreError
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures


@pytest.fixture
def where(tmp_path, tiny_model, bucket):  # noqa: F811
    """A directory whose experiment scored into a bucket, in many shards."""
    data = write_rows(tmp_path / "d.jsonl", preference_rows(8))
    experiment(tmp_path, tiny_model, data, reference={"store": bucket, "tokens_per_shard": 200})
    refscore_here(tmp_path, "precompute", "--config", "experiment.yaml", "--run", "first")
    return tmp_path


def test_a_bucket_is_listed_checked_merged_and_tidied(where, bucket):  # noqa: F811
    def store(*words):
        return " ".join(refscore_here(where, "store", *words, "--store", bucket).split())

    held = store("ls")
    assert "first" in held
    assert " 16 " in held
    shards = int(store("verify").split(" shards checked, 0 damaged")[0].split()[-1])
    assert shards > 3
    assert f"small shards: {shards} in" in store("gc")
    assert f"merged {shards} shards of" in store("compact")
    assert "1 shards checked" in store("verify")
    assert "removes 0 files of 0 bytes" in store("gc", "--quota", "1GB", "--keep-within", "30d")
    assert "exceeded by" in store("gc", "--quota", "0.0001MB", "--apply")
    explained = refscore_here(where, "store", "explain", "--config", "experiment.yaml")
    assert "16 hits, 0 misses" in explained
    # of another reference the nearest is named, which lies in the bucket too
    explained = refscore_here(
        where, "store", "explain", "--config", "experiment.yaml", "--set", "reference.dtype=bfloat16"
    )
    assert "0 hits, 16 misses" in explained
    assert "numerics: dtype 'float32' -> 'bfloat16'" in explained


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-within", "soon"], "'soon' is not a length of time: give hours, days or weeks"),
        (["--quota", "much"], "'much' is not a size: give a number and a unit"),
        (["--even-used"], "name one with --quota"),
    ],
)
def test_what_gc_is_asked_for_wrongly(tmp_path, words, said):
    (tmp_path / "data/store").mkdir(parents=True)
    assert said in refscore_here(tmp_path, "store", "gc", *words, code=2)


def test_a_bucket_that_is_not_there(tmp_path, bucket):  # noqa: F811
    for command in ("ls", "verify", "gc", "compact"):
        said = refscore_here(tmp_path, "store", command, "--store", "s3://no-such-bucket-here/x", code=3)
        assert "does not exist" in said


def test_a_run_is_registered_before_its_data_is_read(where, bucket, monkeypatch):  # noqa: F811
    """What it found there must stay until it has joined it, however long the reading takes."""

    def registered():
        said = refscore_here(where, "store", "ls", "--store", bucket, "--json")
        (reference,) = json.loads(said[said.index("\n{") :])["references"]
        return reference["runs"]

    assert registered() == ["first"]

    def fails(_):
        raise RefscoreError("the data is being read")

    monkeypatch.setattr("pipeline.precompute.plan.Planning._has_more", fails)
    for command, run in ((["precompute", "--plan"], "shown"), (["precompute"], "second"), (["train"], "third")):
        said = refscore_here(where, *command, "--config", "experiment.yaml", "--run", run, code=1)
        assert "the data is being read" in said
    assert registered() == ["first", "second", "third"]
