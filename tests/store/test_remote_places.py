"""The store at an S3 URL, against a real S3 server process: what is fetched, how often, and what is damaged on the way."""

import json
import re
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.errors import ConfigError, RefscoreError
from pipeline.store import pieces, remote_places
from pipeline.store.index import publishing
from pipeline.store.index.index_file import IndexFile
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import groups_of
from pipeline.store.tidying.inventory import holding
from tests.conftest import experiment, preference_rows, write_rows
from tests.forked import refscore
from tests.store.test_store import REFERENCE, keys, scored


@pytest.fixture
def requests(server, tmp_path_factory):
    """The requests since the last time that it was asked."""
    seen = 0

    def since():
        nonlocal seen
        made = re.findall(r"(GET|HEAD|PUT|POST|DELETE) /", (tmp_path_factory.getbasetemp() / "requests").read_text())
        fresh, seen = made[seen:], len(made)
        return fresh

    since()
    return since


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """moto's S3 server on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path_factory.getbasetemp() / "requests").open("w"),
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
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
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
    shard = next(path for path in before if path.endswith(".parquet"))
    published = pq.read_schema(pa.BufferReader(files.cat_file(shard))).metadata[b"refscore"]
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
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    assert len(Store([bucket], REFERENCE).lookup(keys(scored(1))).missing) == 1
    assert "not those that were published" in caplog.text


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


def damage(path, at=100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def objects(bucket):
    import fsspec

    files, root = fsspec.url_to_fs(f"{bucket}/{REFERENCE.reference_id}")
    files.invalidate_cache()
    return files, [path for path in files.ls(root) if path.endswith(".parquet")]


def test_a_damaged_object_is_replaced_by_the_next_publication_of_its_name(bucket, tmp_path, monkeypatch, caplog):
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    table = store.lookup(keys(scored(1))).found().to_arrow().cast(SCORES)
    files, (shard,) = objects(bucket)
    sound = files.cat_file(shard)
    published = json.loads(pq.read_schema(pa.BufferReader(sound)).metadata[b"refscore"])["published"]
    files.pipe_file(shard, sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    # another machine, which finds it damaged, scores again and publishes the very same
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    other = Store([bucket], REFERENCE)
    assert len(other.lookup(keys(scored(1))).missing) == 1
    other.publish_table(table, [{}], published=published)
    assert "takes its place" in caplog.text
    assert objects(bucket)[0].cat_file(shard) == sound
    # here, and on a third
    assert not len(other.lookup(keys(scored(1))).missing)
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "third")
    assert not len(Store([bucket], REFERENCE).lookup(keys(scored(1))).missing)


def test_a_piece_that_is_damaged_here_is_fetched_again(bucket, requests):
    Store([bucket], REFERENCE).publish([scored(1)])
    (piece,) = remote_places.CACHE.glob("scores-*")
    sound = piece.read_bytes()
    for content in (sound[:100] + b"?" + sound[101:], sound[:-9], b""):
        piece.write_bytes(content)
        requests()
        lookup = Store([bucket], REFERENCE).lookup(keys(scored(1)))
        assert lookup.found()["logps"].to_list()[0] == scored(1).logps.tolist()
        assert piece.read_bytes() == sound
        assert requests() == ["GET"] * 2  # the listing, and the piece


def test_a_shard_is_examined_as_it_stands_in_the_bucket(bucket):
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    place = store.places[0]
    (shard,) = place.listed().shards
    assert place.examine(shard, "seen by a test")
    files, (path,) = objects(bucket)
    sound = files.cat_file(path)
    files.pipe_file(path, sound[:100] + b"?" + sound[101:])
    assert not place.examine(shard, "seen by a test")
    assert place.listed().shards == []
    files.rm_file(path)
    assert not place.examine(shard, "seen by a test")


def test_an_object_whose_own_bytes_are_unsound_is_not_fetched_for_ever(bucket, monkeypatch):
    """The right digest, and rows that cannot be true: another copy would be no better."""
    store = Store([bucket], REFERENCE)
    store.publish([scored(1)])
    place = store.places[0]
    (shard,) = place.listed().shards
    monkeypatch.setattr(remote_places, "check_shard", lambda _: "a value above 0")
    assert not place.examine(shard, "seen by a test")
    assert place.listed().shards == []


def test_an_object_that_is_listed_and_cannot_be_fetched_is_an_error_after_a_few_tries(bucket, tmp_path, monkeypatch):
    Store([bucket], REFERENCE).publish([scored(1)])
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    waited, tries = [], []
    monkeypatch.setattr("pipeline.store.places.time.sleep", waited.append)
    store = Store([bucket], REFERENCE)
    files = store.places[0]._files

    def refuse(paths, *_, **__):
        tries.append(1)
        return [PermissionError("Access Denied")] * len(paths)

    monkeypatch.setattr(files, "cat_ranges", refuse)
    with pytest.raises(
        RefscoreError, match=r"scores-[0-9a-f]+\.parquet is listed but cannot be read, 6 times .*Denied"
    ):
        store.lookup(keys(scored(1)))
    assert len(tries) == 6
    assert waited == sorted(waited)
    assert len(waited) == 5


@pytest.fixture
def many(bucket, monkeypatch, tmp_path):
    """Forty shards in the bucket, covered by an index, and a machine that has seen none of them."""
    store = Store([bucket], REFERENCE)
    with monkeypatch.context() as without:
        without.setattr(publishing.Additions, "add", lambda *_: False)
        for number in range(40):
            store.publish([scored(number), scored(1000 + number)])
    assert len(store.lookup(keys(*map(scored, range(50)))).missing) == 10
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    return bucket


def test_the_index_is_fetched_and_no_shard_for_a_plan(many, requests):
    lookup = Store([many], REFERENCE).lookup(keys(*map(scored, range(50))))
    assert len(lookup.missing) == 10
    # two listings, and the index in one piece
    assert requests() == ["GET"] * 3
    assert len(lookup.found()) == 40
    assert requests() == ["GET"] * 40
    # all of that is here now
    assert len(Store([many], REFERENCE).lookup(keys(*map(scored, range(50)))).found()) == 40
    assert requests() == ["GET"] * 2


def test_who_asks_often_lists_once(many, requests):
    store = Store([many], REFERENCE)
    for number in range(20):
        assert len(store.lookup(keys(scored(number)), listed_within=60).held) == 1
    assert len(requests()) == 3
    # what this process publishes it finds
    store.publish([scored(60)])
    assert len(store.lookup(keys(scored(60)), listed_within=60).held) == 1


def test_an_index_that_is_damaged_in_the_bucket_is_made_again(many, caplog):
    import fsspec

    files, root = fsspec.url_to_fs(f"{many}/{REFERENCE.reference_id}/index")
    (path,) = files.ls(root)
    sound = files.cat_file(path)
    for damaged in (sound[:40] + b"?" + sound[41:], sound[:-50], b"?" * len(sound)):
        files.pipe_file(path, damaged)
        lookup = Store([many], REFERENCE).lookup(keys(*map(scored, range(50))))
        assert len(lookup.missing) == 10
        assert len(lookup.found()) == 40
        files.invalidate_cache()
        assert files.cat_file(path) == sound


def test_who_may_not_write_reads_what_no_index_covers(many, monkeypatch):
    import fsspec

    files, root = fsspec.url_to_fs(f"{many}/{REFERENCE.reference_id}/index")
    files.rm_file(files.ls(root)[0])
    store = Store([many], REFERENCE)
    for name in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(store.places[0]._files, name, lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    for _ in range(2):
        assert len(store.lookup(keys(*map(scored, range(50)))).found()) == 40
    assert not list(remote_places.CACHE.glob(".tmp-*"))


def large(number):
    return scored(number, length=3000)


def test_of_a_large_shard_those_row_groups_are_fetched_that_are_asked_for(bucket, monkeypatch, tmp_path, requests):
    monkeypatch.setattr("pipeline.artifacts.tables._AT_ONCE", 8)
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    Store([bucket], REFERENCE).publish([large(number) for number in range(64)])
    files, (path,) = objects(bucket)
    size = files.info(path)["size"]
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    lookup = Store([bucket], REFERENCE).lookup(keys(large(5), large(6)))
    requests()
    assert lookup.found().sort("key")["logps"].to_list()[0] in (
        large(5).logps.tolist(),
        large(6).logps.tolist(),
    )
    assert len(requests()) <= 2
    fetched = sum(piece.stat().st_size for piece in remote_places.CACHE.glob("scores-*"))
    # every row group's keys, and the values of one
    assert fetched < size / 2


def test_a_cache_that_is_smaller_than_what_is_read_evicts_and_all_is_found(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    rows = [large(number) for number in range(64)]
    for start in range(0, 64, 16):
        Store([bucket], REFERENCE).publish(rows[start : start + 16])
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    monkeypatch.setenv("REFSCORE_CACHE_GIB", str(10 * 2**14 / 2**30))
    found = Store([bucket], REFERENCE).lookup(keys(*rows)).found()
    assert {row["key"]: row["logps"] for row in found.to_dicts()} == {row.key: row.logps.tolist() for row in rows}
    assert sum(piece.stat().st_size for piece in remote_places.CACHE.glob("scores-*")) < 20 * 2**14


def test_a_bit_that_flips_in_a_large_object_is_a_miss_and_heals(bucket, monkeypatch, tmp_path):
    """No digest of all bytes is compared where a part is read: rows and pages are."""
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    rows = [large(number) for number in range(4)]
    Store([bucket], REFERENCE).publish(rows)
    files, (path,) = objects(bucket)
    sound = files.cat_file(path)
    missed = 0
    for number, at in enumerate(range(8, len(sound), len(sound) // 12)):
        files.pipe_file(path, sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        monkeypatch.setattr(remote_places, "CACHE", tmp_path / str(number))
        store = Store([bucket], REFERENCE)
        lookup = store.lookup(keys(*rows))
        for key, logps in lookup.found().select("key", "logps").iter_rows():
            assert logps == next(row.logps.tolist() for row in rows if row.key == key)
        missed += len(lookup.missing) > 0
        # the object is replaced by one that is sound: here it is found again at the next start
        files.pipe_file(path, sound)
        assert len(Store([bucket], REFERENCE).lookup(keys(*rows)).found()) == 4
    assert missed > 8


def test_who_may_put_and_not_delete_may_publish(bucket, monkeypatch):
    store = Store([bucket], REFERENCE)
    files = store.places[0]._files

    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(files, "rm_file", refuse)
    assert store.why_not_writable() is None
    store.publish([scored(1)])
    assert not len(store.lookup(keys(scored(1))).missing)
    monkeypatch.setattr(files, "pipe_file", refuse)
    assert "Access Denied" in store.why_not_writable()


def test_a_place_without_put_if_absent_takes_the_name_for_the_content(bucket, monkeypatch):
    store = Store([bucket], REFERENCE)
    files = store.places[0]._files
    pipe = files.pipe_file

    asked = []

    def without(path, value, mode="overwrite", **how):
        asked.append(mode)
        if mode == "create":
            raise NotImplementedError
        return pipe(path, value, **how)

    monkeypatch.setattr(files, "pipe_file", without)
    store.publish([scored(1)])
    assert asked == ["create", "overwrite"] * 2  # reference.json and the shard
    assert len(objects(bucket)[1]) == 1
    assert not len(store.lookup(keys(scored(1))).missing)


def test_a_backend_that_connects_when_it_is_opened_and_cannot_is_a_message():
    with pytest.raises(RefscoreError, match=r"ftp://127.0.0.1:9/s cannot be reached .*network"):
        Store(["ftp://127.0.0.1:9/s"], REFERENCE)


@pytest.fixture
def published(bucket, monkeypatch, tmp_path, requests):
    """A hundred shards that were published to the bucket, a machine that has seen none of them, and the requests that it took."""
    store = Store([bucket], REFERENCE)
    requests()
    for number in range(100):
        store.publish([scored(number)])
    store.finish()
    monkeypatch.setattr(remote_places, "CACHE", tmp_path / "other")
    return bucket, requests()


def test_what_was_published_is_known_to_another_machine_from_the_index_alone(published, requests):
    bucket, of_publishing = published
    lookup = Store([bucket], REFERENCE).lookup(keys(*map(scored, range(120))))
    assert len(lookup.missing) == 20
    # two listings, six files of sixteen shards and one of four
    assert requests() == ["GET"] * 9
    # and the index took little beside the shards: a listing and a file for each sixteen
    index = len(of_publishing) - 4 * 100
    assert 12 <= index <= 16


def test_index_files_in_a_bucket_become_one_and_stay_few(published, requests, monkeypatch):
    bucket, _ = published
    monkeypatch.setattr(publishing, "WORTH_SHARDS", 2)
    store, asked = Store([bucket], REFERENCE), []
    for start in range(100, 164, 32):
        requests()
        for number in range(start, start + 32):
            store.publish([scored(number)])
        asked.append(len(requests()) - 4 * 32)
    # for each two shards a listing and a file; seven others are read and removed at every eighth
    assert max(asked) <= 16 * 2 + 3 * 14
    requests()
    assert len(Store([bucket], REFERENCE).lookup(keys(*map(scored, range(164)))).missing) == 0
    assert len(requests()) <= 2 + 2 * 7


def test_what_could_be_merged_is_known_from_the_index(published, requests):
    bucket, _ = published
    place = Store([bucket], REFERENCE).places[0]
    entries = place.entries()
    requests()
    assert [len(group) for group in groups_of(place, entries)] == [100]
    assert requests() == ["GET"] * 9
    assert holding(REFERENCE.reference_id, place).sequences == 100
    # the description, the listing, and of every shard its end and two columns
    assert len(requests()) <= 3 + 2 * 100


def test_who_may_not_read_the_index_reads_shards(published, monkeypatch):
    bucket, _ = published
    store = Store([bucket], REFERENCE)
    ranges = store.places[0]._files.cat_ranges
    waited = []
    monkeypatch.setattr("pipeline.store.places.time.sleep", waited.append)

    def refuse(paths, begins, *more, **how):
        refused = [PermissionError("Access Denied")] * len(paths)
        return refused if "/index/" in paths[0] else ranges(paths, begins, *more, **how)

    monkeypatch.setattr(store.places[0]._files, "cat_ranges", refuse)
    assert len(store.lookup(keys(*map(scored, range(100)))).found()) == 100
    assert 2 < len(waited) < 10


def test_an_index_that_goes_while_it_is_read_is_asked_no_more(published, monkeypatch):
    bucket, _ = published
    store = Store([bucket], REFERENCE)
    asked = keys(*map(scored, range(100)))
    monkeypatch.setattr("pipeline.store.places.time.sleep", lambda _: None)
    find, tries = IndexFile.find, []

    def gone(self, words):
        tries.append(self.name)
        if tries.count(tries[0]) < 9 and self.name == tries[0]:
            raise FileNotFoundError("it is gone")
        return find(self, words)

    monkeypatch.setattr(IndexFile, "find", gone)
    assert len(store.lookup(asked).found()) == 100
    assert tries.count(tries[0]) == 5
    # others may have it
    assert tries[0] in store.places[0].listed().indexes
