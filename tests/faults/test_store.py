"""Writers killed at every step, torn and flipped shards, full disks, eight writers, read-only places."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.store.shard import shard_files
from pipeline.store.tidying.compaction import compact, groups_of
from pipeline.store.tidying.retention import Rules, parts_of, removals_by
from tests.faults.conftest import REFERENCE, child, found_numbers, open_store, oracle, shard_names

ROOT = Path(__file__).parent.parent.parent
SOURCE = "".join(
    (ROOT / "pipeline" / "store" / name).read_text()
    for name in ("store.py", "local_places.py", "tidying/compaction.py", "remote_places.py")
)
POINTS = re.findall(r'reached\("((?:publish|compact): [^"]+)"\)', SOURCE)
PUBLISH = list(dict.fromkeys(point for point in POINTS if point.startswith("publish")))
COMPACT = list(dict.fromkeys(point for point in POINTS if point.startswith("compact")))


def test_there_are_enough_moments():
    checkpoint = re.findall(
        r'reached\("checkpoint: [^"]+"\)', (ROOT / "pipeline" / "training" / "checkpoint.py").read_text()
    )
    assert len(PUBLISH) + len(COMPACT) + len(checkpoint) >= 12


def directory(where):
    return where / REFERENCE.reference_id


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("point", PUBLISH)
def test_a_writer_killed_anywhere_loses_at_most_what_it_was_writing(tmp_path, case, point, count):
    where = tmp_path / "store"
    open_store(where).publish([oracle(n) for n in range(10)])
    done = child(
        "die_at(sys.argv[2], int(sys.argv[3]))\n"
        "open_store(Path(sys.argv[1])).publish([oracle(n) for n in range(10, 20)])\n"
        "open_store(Path(sys.argv[1])).publish([oracle(n) for n in range(20, 30)])",
        where, point, count,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = found_numbers(where, range(30))
    assert found >= set(range(10))
    assert found - set(range(10)) in (set(), set(range(10, 20)), set(range(10, 30)))
    # the next run scores what is missing
    open_store(where).publish([oracle(n) for n in set(range(30)) - found] or [oracle(0)])
    assert found_numbers(where, range(30)) == set(range(30))
    case("SIGKILL while publishing")


@pytest.mark.parametrize("point", [*COMPACT, *PUBLISH])
def test_a_compaction_killed_anywhere_loses_nothing(tmp_path, case, point):
    where = tmp_path / "store"
    for start in range(0, 60, 10):
        open_store(where).publish([oracle(n) for n in range(start, start + 12)])
    done = child(
        "from pipeline.store.tidying.compaction import compact\nfrom tests.faults.conftest import shard_names\n"
        "die_at(sys.argv[2])\nwhere = Path(sys.argv[1])\ncompact(open_store(where), shard_names(where))",
        where, point,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert found_numbers(where, range(62)) == set(range(62))
    compact(open_store(where), shard_names(where))
    assert found_numbers(where, range(62)) == set(range(62))
    case("SIGKILL while compacting")


def test_compaction_makes_one_shard_of_many_without_repeats(tmp_path, case):
    where = tmp_path / "store"
    for start in range(0, 60, 10):
        open_store(where).publish([oracle(n) for n in range(start, start + 12)])
    place = open_store(where).places[0]
    assert [compact(open_store(where), group) for group in groups_of(place, place.entries())] == [62]
    (shard,) = shard_files(directory(where))
    assert len(pl.read_parquet(shard)) == 62
    assert found_numbers(where, range(62)) == set(range(62))
    assert groups_of(place, place.entries()) == []
    case("compaction")


def test_readers_find_every_key_while_compactions_run(tmp_path, case):
    where = tmp_path / "store"
    for start in range(0, 200, 5):
        open_store(where).publish([oracle(n) for n in range(start, start + 5)])
    code = (
        "from pipeline.store.tidying.compaction import compact\nfrom tests.faults.conftest import open_store, shard_names\n"
        "d = Path(sys.argv[1])\n"
        "while len(shard_names(d)) > 1: compact(open_store(d), shard_names(d)[:3])\n"
    )
    writer = subprocess.Popen(
        [os.sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{code}", where], cwd=ROOT
    )
    reads = 0
    while writer.poll() is None:
        assert found_numbers(where, range(200)) == set(range(200))
        reads += 1
    assert writer.returncode == 0
    assert reads >= 2
    assert found_numbers(where, range(200)) == set(range(200))
    case("reading while a compaction runs")


@pytest.fixture
def two_shards(tmp_path):
    where = tmp_path / "store"
    open_store(where).publish([oracle(n) for n in range(40)])
    (first,) = shard_files(directory(where))
    open_store(where).publish([oracle(n) for n in range(40, 80)])
    (second,) = set(shard_files(directory(where))) - {first}
    return where, second


def check_healing(where, shard):
    """The other shard's rows are there, the damaged one's are misses and can be scored again."""
    assert found_numbers(where, range(80)) == set(range(40))
    assert not shard.exists()
    open_store(where).publish([oracle(n) for n in range(40, 80)])
    assert found_numbers(where, range(80)) == set(range(80))


@pytest.mark.parametrize("part", range(8))
def test_a_torn_shard_is_a_miss(two_shards, case, part):
    where, shard = two_shards
    size = shard.stat().st_size
    os.truncate(shard, [0, 1, 4, size // 4, size // 2, size - 8, size - 4, size - 1][part])
    check_healing(where, shard)
    case("shard truncated")


def places(size):
    """40 bits: in the header, in the pages, in the footer."""
    generator = random.Random(4)
    footer = size - 1500
    ranges = [(0, 4)] * 4 + [(4, footer)] * 22 + [(footer, size - 8)] * 10 + [(size - 8, size)] * 4
    return [(generator.randrange(*span), generator.randrange(8)) for span in ranges]


@pytest.mark.parametrize("number", range(40))
def test_a_flipped_bit_is_a_miss(two_shards, case, number):
    where, shard = two_shards
    at, bit = places(shard.stat().st_size)[number]
    content = bytearray(shard.read_bytes())
    content[at] ^= 1 << bit
    shard.write_bytes(content)
    check_healing(where, shard)
    case("one bit of a shard flipped")


FULL = """
try:
    open_store(Path(sys.argv[1])).publish([oracle(n) for n in range(10, 3000)])
except Exception as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""


def check_full(where, done, case, title):
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("RefscoreError no space left to write")
    assert str(where) in done.stdout
    assert re.search(r"about [\d,]+ bytes are needed", done.stdout)
    assert found_numbers(where, range(10)) == set(range(10))
    assert not list(directory(where).glob(".tmp-*"))
    case(title)


def test_a_file_size_limit_in_the_middle_of_a_shard_is_a_message(tmp_path, case):
    where = tmp_path / "store"
    open_store(where).publish([oracle(n) for n in range(10)])
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    )
    check_full(where, child(limit + FULL, where, cwd=tmp_path), case, "file-size limit while publishing")
    open_store(where).publish([oracle(n) for n in range(10, 3000)])
    assert found_numbers(where, range(3000)) == set(range(3000))


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the file-size limit is tested without")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_a_message_and_the_next_run_goes_on(small_disk, case):
    where = small_disk / "store"
    open_store(where).publish([oracle(n) for n in range(10)])
    check_full(where, child(FULL, where, cwd=small_disk.parent), case, "disk full while publishing")
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    open_store(where).publish([oracle(n) for n in range(10, 3000)])
    assert found_numbers(where, range(3000)) == set(range(3000))


@pytest.mark.parametrize("worth", [1, 16])
def test_a_read_only_file_system_gives_hits_and_says_so_before_a_miss_is_scored(
    small_disk, tmp_path, case, monkeypatch, worth
):
    # if an index of one shard is worth it, one would be made
    monkeypatch.setattr("pipeline.store.index.indexes.WORTH_SHARDS", worth)
    where = small_disk / "store"
    open_store(where).publish([oracle(n) for n in range(10)])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert found_numbers(where, range(20)) == set(range(10))
    assert "Read-only" in open_store(where).why_not_writable()
    # below a writable one it works: the first is written, all are read
    from pipeline.store.store import Store

    both = Store([str(tmp_path / "mine"), str(where)], REFERENCE)
    assert both.why_not_writable() is None
    both.publish([oracle(n) for n in range(10, 20)])
    from tests.faults.conftest import keys_of

    assert len(both.lookup(keys_of(range(20))).found()) == 20
    case("read-only file system")


def test_eight_writers_of_overlapping_rows_lose_nothing(tmp_path, case):
    where = tmp_path / "store"
    code = (
        "import sys\nfrom pathlib import Path\nfrom tests.faults.conftest import oracle, open_store, keys_of\n"
        "number = int(sys.argv[2])\n"
        "mine = range(number * 50, number * 50 + 150)\n"
        "for start in range(mine.start, mine.stop, 10):\n"
        "    store, rows = open_store(Path(sys.argv[1])), range(start, start + 10)\n"
        "    todo = [oracle(rows[at]) for at in store.lookup(keys_of(rows)).missing]\n"
        "    if todo: store.publish(todo)\n"
        "assert not len(store.lookup(keys_of(mine)).missing)\n"
    )
    writers = [
        subprocess.Popen([os.sys.executable, "-c", code, where, str(n)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for n in range(8)
    ]
    for writer in writers:
        assert writer.wait(timeout=120) == 0, writer.stderr.read()
    assert found_numbers(where, range(500)) == set(range(500))
    assert not list(directory(where).glob(".tmp-*"))
    case("eight writers at once")


def test_leftovers_older_than_a_day_are_swept_and_younger_ones_left(tmp_path, case):
    where = tmp_path / "store"
    open_store(where).publish([oracle(1)])
    old, young = directory(where) / ".tmp-1-aa-scores.parquet", directory(where) / ".tmp-2-bb-scores.parquet"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    ((removal,), _) = removals_by(Rules(), parts_of(str(where), {}, {}))
    assert [entry.name for entry in removal.entries] == [old.name]
    case("leftovers of a killed writer")


def test_the_schema_of_a_published_shard_is_the_designed_one(tmp_path):
    open_store(tmp_path).publish([oracle(1)])
    (shard,) = shard_files(directory(tmp_path))
    import pyarrow.parquet as pq

    assert pq.read_schema(shard).remove_metadata().equals(SCORES)
    codecs = {pq.ParquetFile(shard).metadata.row_group(0).column(at).compression for at in range(5)}
    assert codecs == {"ZSTD"}
    encodings = {
        pq.ParquetFile(shard).metadata.row_group(0).column(at).path_in_schema: pq.ParquetFile(shard)
        .metadata.row_group(0)
        .column(at)
        .encodings
        for at in range(5)
    }
    assert "BYTE_STREAM_SPLIT" in encodings["logps.list.element"]
    assert "BYTE_STREAM_SPLIT" in encodings["logp"]
