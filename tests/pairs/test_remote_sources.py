"""Preference data at a URL: files, folders and patterns are read where they lie, by ranges, and known by what the place says."""

import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.experiment import DataConfig
from pipeline.config.files import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.preferences import open_source
from pipeline.pairs.reading import ranges
from pipeline.pairs.rows import must_read_all, open_parts, source_digest
from pipeline.precompute.pairs_file import is_current
from pipeline.precompute.plan import Planning, make_plan
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.pairs.inputs import gz, lines, parquet
from tests.store.test_remote_places import bucket, server

__all__ = ["bucket", "server"]


@pytest.fixture
def place(bucket):
    """A function that puts an object, and gives its URL."""
    import s3fs

    def put(name, content):
        s3fs.S3FileSystem().pipe_file(f"{bucket}/{name}", content)
        return f"{bucket}/{name}"

    return put


def named(url, **data):
    return [part.name.rpartition("/scores/")[2] for part in open_parts(url, DataConfig(path=url, **data))[0]]


def plan_of(tmp_path, model, url, *settings):
    path = experiment(tmp_path, model, Path("unused"))
    return make_plan(load_config(path, [f"data.path={url}", *settings]))


def rows_of(plan):
    rows = [row for _, table in plan.pairs.groups() for row in table.to_pylist()]
    return [{name: value for name, value in row.items() if name != "source"} for row in rows]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_lies_at_a_url_is_what_lies_here(place, bucket, tmp_path, tiny_model, monkeypatch, workers):
    rows = preference_rows(40)
    here = write_rows(Path("here.jsonl"), rows)
    local = plan_of(tmp_path, tiny_model, here)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    place("many/a.jsonl", lines(*rows[:20]))
    place("many/b.parquet", parquet(rows[20:30], row_group_size=3))
    place("many/c.jsonl.gz", gz(lines(*rows[30:])))
    place("many/README.md", b"about")
    many = plan_of(tmp_path, tiny_model, f"{bucket}/many", f"data.workers={workers}")
    assert [row["pair_id"] for row in rows_of(many)] == [row["pair_id"] for row in rows_of(local)]
    assert len(many.pairs.parts) > 4
    alone = plan_of(tmp_path, tiny_model, place("one.jsonl", here.read_bytes()), f"data.workers={workers}")
    assert rows_of(alone) == rows_of(local)
    assert alone.keys == local.keys


def test_folders_and_patterns_have_files_of_a_split(place, bucket):
    for name in ("f/train.jsonl", "f/test-0.jsonl", "f/.hidden/x.bin", "f/deep/test.jsonl"):
        place(name, lines(*preference_rows(2)))
    assert named(f"{bucket}/f") == ["f/train.jsonl"]
    assert named(f"{bucket}/f/", split="test") == ["f/deep/test.jsonl", "f/test-0.jsonl"]
    assert named(f"{bucket}/f/*.jsonl") == ["f/test-0.jsonl", "f/train.jsonl"]
    assert named(f"{bucket}/f/train.jsonl") == ["f/train.jsonl"]
    with pytest.raises(DataError, match="has no split 'other': its files give"):
        named(f"{bucket}/f", split="other")
    place("f/more.bin", b"x")
    with pytest.raises(DataError, match=r"also holds more\.bin, which is not read"):
        named(f"{bucket}/f")
    with pytest.raises(DataError, match=r"f/more\.bin is not read; files ending in \.jsonl"):
        named(f"{bucket}/f/*")


def test_a_digest_follows_the_object_and_is_not_read_for(place, bucket, monkeypatch):
    url = place("d.jsonl", lines(*preference_rows(3)))
    before = source_digest(url, "train")
    monkeypatch.setattr("pipeline.pairs.reading.remote.RemoteFile.open", lambda *_: pytest.fail("read"))
    assert source_digest(url, "train") == before == open_parts(url, DataConfig(path=url))[1]
    place("d.jsonl", lines(*preference_rows(4)))
    assert source_digest(url, "train") not in (None, before)
    folder = source_digest(f"{bucket}/", "train")
    place("e.jsonl", lines(*preference_rows(1)))
    assert source_digest(f"{bucket}/", "train") not in (None, folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_object_that_changes_before_it_is_read_is_said(place, tmp_path, tiny_model, workers):
    url = place("d.jsonl", lines(*preference_rows(12)))
    path = experiment(tmp_path, tiny_model, Path("unused"))
    planning = Planning(load_config(path, [f"data.path={url}", f"data.workers={workers}"]))
    assert planning._assembly._sources.opened
    place("d.jsonl", lines(*reversed(preference_rows(12))))
    with pytest.raises(DataError, match=r"d\.jsonl changed while it was read"):
        planning.plan()
    place("d.jsonl", lines(*preference_rows(12)))
    assert plan_of(tmp_path, tiny_model, url).pairs.read == 12


def test_a_place_that_lists_names_alone_is_asked_for_more(tmp_path, monkeypatch):
    """A web server's file has a size, and no list that says it."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("d.jsonl"), preference_rows(3))
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/d.jsonl"
        assert len(list(open_source(url, DataConfig(path=url)).preferences())) == 3
        monkeypatch.setattr("pipeline.pairs.reading.remote._info", lambda *_: {"size": None})
        with pytest.raises(DataError, match=r"d\.jsonl: its server does not say how large it is"):
            open_parts(url, DataConfig(path=url))
        web.shutdown()


def test_a_place_without_tags_is_read_for_its_digest(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", preference_rows(3))
    url = f"file://{path}"
    assert source_digest(url, "train") == source_digest(str(path), "train")
    source = open_source(url, DataConfig(path=url))
    assert len(list(source.preferences())) == 3


def test_a_run_is_stale_when_its_object_changed(place, tmp_path, tiny_model):
    url = place("d.jsonl", lines(*preference_rows(8)))
    config = experiment(tmp_path, tiny_model, Path("unused"))
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r", "--set", f"data.path={url}")
    pairs, now = tmp_path / "data/runs/r/pairs.parquet", load_config(config, [f"data.path={url}"])
    assert is_current(pairs, now)
    place("d.jsonl", lines(*preference_rows(9)))
    assert not is_current(pairs, now)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("gone.jsonl", DataError, "no such file, folder or pattern"),
        ("gone/*.jsonl", DataError, "no such file, folder or pattern"),
        ("broken.jsonl", DataError, "line 2, column 2: not valid JSON"),
        ("cut.parquet", DataError, "cannot be read as Parquet"),
        ("empty.jsonl", DataError, "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_url(place, bucket, name, error, said):
    place("broken.jsonl", lines(preference_rows(1)[0], "{x"))
    place("cut.parquet", parquet(preference_rows(3))[:-20])
    place("empty.jsonl", b"")
    with pytest.raises(error, match=said) as stop:
        list(open_source(f"{bucket}/{name}", DataConfig(path=f"{bucket}/{name}")).preferences())
    assert f"{bucket}/{name}" in str(stop.value)


def test_a_place_that_cannot_be_reached_says_what_to_look_at(bucket, monkeypatch):
    import s3fs

    with pytest.raises(ConfigError, match=r"data\.path nosuch://x/d\.jsonl: .*extra 's3'"):
        open_parts("nosuch://x/d.jsonl", DataConfig(path="x"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    # it would wait longer each time it asks once more
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="check the URL, the network and the credentials"):
        open_parts(f"{bucket}/d.jsonl", DataConfig(path="x"))
    # not at hand is not changed
    assert source_digest(f"{bucket}/d.jsonl", "train") is None


def test_settings_of_other_kinds_of_sources_are_refused():
    with pytest.raises(ConfigError, match=r"data\.revision is that of a Hub data set"):
        must_read_all(DataConfig(path="s3://b/d.jsonl", revision="x"))
    with pytest.raises(ConfigError, match=r"data\.path names files only"):
        must_read_all(DataConfig(path="s3://b/d.jsonl", split="test"))
    must_read_all(DataConfig(path="s3://b/folder", split="test"))


def test_a_table_is_read_by_its_row_groups(place, monkeypatch):
    import s3fs

    rows = [{**row, "chosen": row["chosen"] + "x" * 20_000} for row in preference_rows(64)]
    pq.write_table(pa.Table.from_pylist(rows), "d.parquet", row_group_size=4, compression="none", use_dictionary=False)
    url = place("d.parquet", Path("d.parquet").read_bytes())
    monkeypatch.setattr(ranges, "RANGE_BYTES", 200_000)
    monkeypatch.setattr("pipeline.pairs.reading.remote._AT_ONCE", 1 << 14)
    ((part,), _) = open_parts(url, DataConfig(path=url))
    found = part.ranges()
    assert len(found) > 4
    read, fetch = [], s3fs.core.S3File._fetch_range
    monkeypatch.setattr(
        s3fs.core.S3File, "_fetch_range", lambda self, begin, end: read.append(end - begin) or fetch(self, begin, end)
    )
    assert list(found[1].rows()) == rows[len(list(found[0].rows())) :][: len(list(found[1].rows()))]
    assert sum(read) < Path("d.parquet").stat().st_size
