"""The store at an S3 URL, against a real S3 server process."""

import json
import socket
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from pipeline import remote_shelf
from pipeline.errors import ConfigError, RefscoreError
from pipeline.schema import SCORES
from pipeline.store import Store
from tests.conftest import experiment, preference_rows, refscore, write_rows
from tests.pipeline.test_store import REFERENCE, keys, scored


@pytest.fixture(scope="module")
def server():
    """moto's S3 server on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(timeout=10)


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A bucket's URL; the endpoint and the keys come from the environment, as they do for users."""
    import s3fs

    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"b{abs(hash(str(tmp_path))):x}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}/scores"


def test_what_one_machine_publishes_another_finds(bucket, tmp_path, monkeypatch):
    rows = [scored(n) for n in range(30)]
    store = Store([bucket], REFERENCE)
    assert store.why_not_writable() is None
    assert len(store.lookup(keys(*rows)).missing) == 30
    store.publish(rows[:20])
    # another machine: no local copy of anything
    monkeypatch.setattr(remote_shelf, "CACHE", tmp_path / "other")
    other = Store([str(tmp_path / "local"), bucket], REFERENCE)
    assert other.lookup(keys(*rows)).missing.tolist() == list(range(20, 30))
    other.publish(rows[20:])
    assert len(other.lookup(keys(*rows)).found()) == 30
    # the first place was written, not the bucket
    assert len(Store([bucket], REFERENCE).lookup(keys(*rows)).missing) == 10


def test_publishing_replaces_nothing(bucket):
    import fsspec

    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    files, root = fsspec.url_to_fs(f"{bucket}/{REFERENCE.reference_id}")
    before = {path: files.info(path)["ETag"] for path in files.ls(root)}
    assert len(before) == 2
    reference = next(path for path in before if path.endswith("reference.json"))
    with pytest.raises(FileExistsError):
        files.pipe_file(reference, b"{}", mode="create")
    table = store.lookup(keys(scored(1))).found().to_arrow().cast(SCORES)
    published = pq.read_schema(next((remote_shelf.CACHE / REFERENCE.reference_id).glob("scores-*"))).metadata[
        b"refscore"
    ]
    store.publish_table(table, [{}], published=json.loads(published)["published"])
    files.invalidate_cache()
    assert {path: files.info(path)["ETag"] for path in files.ls(root)} == before


def test_a_shard_damaged_in_the_bucket_is_a_miss(bucket, tmp_path, monkeypatch, caplog):
    import fsspec

    Store([bucket], REFERENCE).publish([scored(1)])
    files, root = fsspec.url_to_fs(f"{bucket}/{REFERENCE.reference_id}")
    (shard,) = (path for path in files.ls(root) if path.endswith(".parquet"))
    content = bytearray(files.cat_file(shard))
    content[100] ^= 1
    files.pipe_file(shard, bytes(content))
    monkeypatch.setattr(remote_shelf, "CACHE", tmp_path / "other")
    assert len(Store([bucket], REFERENCE).lookup(keys(scored(1))).missing) == 1
    assert "not the bytes that were published" in caplog.text


def test_a_bucket_that_is_not_there_is_a_message(bucket):
    absent = Store(["s3://no-such-bucket-here/x"], REFERENCE)
    assert "no-such-bucket-here" in absent.why_not_writable()
    with pytest.raises(RefscoreError, match="cannot be published"):
        absent.publish([scored(1)])


def test_an_unknown_protocol_is_a_message():
    with pytest.raises(ConfigError, match="nosuch"):
        Store(["nosuch://place"], REFERENCE)


def test_the_second_machine_scores_nothing(bucket, tmp_path, tiny_model):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(8))
    for name, places in (("one", [bucket]), ("two", ["data/store", bucket])):
        where = tmp_path / name
        where.mkdir()
        config = experiment(where, tiny_model, data, reference={"store": places})
        said = refscore(where, "precompute", "--config", config)
        assert ("starting transformers" in said) == (name == "one")
    assert "16 hits, 0 misses" in said
