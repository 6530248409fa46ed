"""Single bits of real shards flipped while everything that is remembered of the file says that nothing changed.

What vouches for a shard without reading it (size, times, inode, any memory of digests) is made to vouch always. `make faults`
tries every bit of footers and page headers of shards of one and three row groups; the tests a part of them.
"""

from __future__ import annotations

import logging
import os
import random
import struct
import subprocess

import pyarrow.parquet as pq
import pytest

from pipeline.store.shard import digest_in, shard_files
from tests.faults.conftest import EVERYTHING, REFERENCE, found_numbers, open_store, oracle

ROWS = 60
# rows of a row group, and one bit in how many is tried: the footer of many row groups is long
SHARDS = {"one row group": (1000, 1), "three row groups": (24, 1), "many row groups": (6, 4)}
# the tests, beside `make faults`, try one in so many of these
_PART = 1 if EVERYTHING else 50
_LONGEST_HEADER = 48


@pytest.fixture
def vouched(monkeypatch):
    """Whatever file is asked for, its digest is remembered as the right one."""
    monkeypatch.setattr(
        "pipeline.store.local_places.files_sha256", lambda paths: {path: digest_in(path.name) for path in paths}
    )
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def shard_of(where, rows_of_a_group, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.artifacts.tables._AT_ONCE", rows_of_a_group)
        open_store(where).publish([oracle(n) for n in range(ROWS)])
    (shard,) = shard_files(where / REFERENCE.reference_id)
    return shard


def bits(shard):
    """Positions of bits by the part of the file: footer, page headers (and what follows them), data."""
    content = shard.read_bytes()
    footer = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    metadata = pq.read_metadata(shard)
    starts = [
        metadata.row_group(group).column(column).data_page_offset
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    headers = sorted({at for start in starts for at in range(start, min(start + _LONGEST_HEADER, footer))})
    data = sorted(set(range(4, footer)) - set(headers))
    parts = {"footer": range(footer, len(content)), "page header": headers, "page data": data, "magic": range(4)}
    draw = random.Random(7)
    return {
        part: [8 * at + draw.randrange(8) for at in places] if part == "page data" else [8 * at + bit for at in places for bit in range(8)]
        for part, places in parts.items()
    }  # fmt: skip


def flip(shard, bit):
    """Flip one bit in place and put the times back; size and inode stay."""
    status = shard.stat()
    descriptor = os.open(shard, os.O_RDWR)
    (byte,) = os.pread(descriptor, 1, bit // 8)
    os.pwrite(descriptor, bytes([byte ^ (1 << bit % 8)]), bit // 8)
    os.close(descriptor)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("groups", SHARDS)
@pytest.mark.parametrize("part", ["footer", "page header", "page data", "magic"])
@pytest.mark.timeout(3600)
def test_a_flipped_bit_is_healed_or_harmless(tmp_path, vouched, monkeypatch, case, groups, part):
    where = tmp_path / "store"
    rows_of_a_group, step = SHARDS[groups]
    shard = shard_of(where, rows_of_a_group, monkeypatch)
    aside = shard.parent / "corrupt" / shard.name
    chosen = bits(shard)[part]
    healed = 0
    for bit in chosen[:: step * (1 if part == "magic" else _PART)]:
        flip(shard, bit)
        # no wrong number, or `found_numbers` says so; no error
        found = found_numbers(where, range(ROWS))
        if aside.exists():
            # rows that were read and checked before the damage was met are true
            healed += 1
            aside.rename(shard)
        else:
            assert found == set(range(ROWS)), f"bit {bit}: rows were lost without a word"
        flip(shard, bit)
        case(f"one bit of a {part} flipped, {groups}, memory vouches: no wrong number, no traceback")
    # the first four bytes decide nothing: a reader goes by the last ones
    assert healed or part == "magic"
    assert found_numbers(where, range(ROWS)) == set(range(ROWS))


@pytest.mark.timeout(1200)
def test_a_bit_that_flips_between_finding_and_reading_is_healed_or_harmless(tmp_path, vouched, monkeypatch, case):
    from tests.faults.conftest import check_rows, keys_of

    where = tmp_path / "store"
    shard = shard_of(where, 24, monkeypatch)
    aside = shard.parent / "corrupt" / shard.name
    every = [bit for part in bits(shard).values() for bit in part]
    for bit in random.Random(3).sample(every, 3000 if EVERYTHING else 100):
        lookup = open_store(where).lookup(keys_of(range(ROWS)))
        flip(shard, bit)
        found = check_rows(lookup.found(), range(ROWS))
        assert found | set(lookup.missing.tolist()) == set(range(ROWS))
        if aside.exists():
            aside.rename(shard)
        flip(shard, bit)
        case("one bit flipped between lookup and reading: no wrong number, no traceback")


@pytest.fixture
def image(tmp_path):
    """An ext4 file system in a file, and functions that mount and unmount it."""
    file, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    file.write_bytes(bytes(8 * 2**20))
    made = subprocess.run(["mkfs.ext4", "-q", "-F", file], check=False, capture_output=True) if _has_mkfs() else None
    if made is None or made.returncode or subprocess.run(["mount", "-o", "loop", file, place], check=False).returncode:
        pytest.skip(
            "mounting an image needs root, loop devices and mkfs.ext4; flips under a mounted file are tested without"
        )

    def mount():
        subprocess.run(["mount", "-o", "loop", file, place], check=True)

    def unmount():
        subprocess.run(["umount", place], check=True)

    yield file, place, mount, unmount
    subprocess.run(["umount", "-l", place], check=False, capture_output=True)


def _has_mkfs():
    return subprocess.run(["sh", "-c", "command -v mkfs.ext4"], check=False, capture_output=True).returncode == 0


def test_a_bit_that_rots_on_the_disk_between_two_mounts_is_healed_or_harmless(image, case):
    file, place, mount, unmount = image
    where = place / "store"
    open_store(where).publish([oracle(n) for n in range(ROWS)])
    found_numbers(where, range(ROWS))  # remembered as sound
    (shard,) = shard_files(where / REFERENCE.reference_id)
    content, before = shard.read_bytes(), shard.stat()
    unmount()
    start = file.read_bytes().find(content)
    if start < 0:
        mount()
        pytest.skip("the shard does not lie in one piece in the image")
    healed = 0
    for bit in random.Random(5).sample(range(8 * len(content)), 120 if EVERYTHING else 12):
        at = start + bit // 8
        with file.open("r+b") as disk:
            disk.seek(at)
            disk.write(bytes([content[bit // 8] ^ (1 << bit % 8)]))
        mount()
        now = shard.stat()
        assert (now.st_size, now.st_mtime_ns, now.st_ino, now.st_ctime_ns) == (
            before.st_size, before.st_mtime_ns, before.st_ino, before.st_ctime_ns,
        )  # fmt: skip
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        found = found_numbers(where, range(ROWS))
        assert found in (set(), set(range(ROWS)))
        healed += not found
        unmount()
        with file.open("r+b") as disk:
            disk.seek(start)
            disk.write(content)
        case("one bit rotten on the disk between two mounts: no wrong number, no traceback")
    assert healed
    mount()
