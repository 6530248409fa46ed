"""Digests are remembered by path, size, mtime and inode, and read again when any of them differs."""

import hashlib
import os

import pytest

from pipeline import digests


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"a" * 1000)
    return path


def truth(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_known_file_is_not_read_again(file, monkeypatch):
    assert digests.unread_bytes([file]) == 1000
    seen = []
    assert digests.files_sha256([file], seen.append) == {file: truth(file)}
    assert sum(seen) == 1000
    assert digests.unread_bytes([file]) == 0
    monkeypatch.setattr(digests, "_sha256", lambda *_: pytest.fail("read again"))
    assert digests.file_sha256(file) == truth(file)


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_any_difference_reads_it_again(file, change):
    before = digests.file_sha256(file)
    status = file.stat()
    if change == "size":
        file.write_bytes(b"a" * 1001)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "mtime":
        file.write_bytes(b"b" * 1000)
    else:
        other = file.with_name("other")
        other.write_bytes(b"b" * 1000)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)
    assert digests.file_sha256(file) == truth(file) != before


def test_a_memory_that_is_damaged_or_cannot_be_written_costs_time_only(file):
    digests.MEMORY.parent.mkdir(parents=True)
    digests.MEMORY.write_text("{broken")
    assert digests.file_sha256(file) == truth(file)
    digests.MEMORY.unlink()
    digests.MEMORY.mkdir()
    assert digests.file_sha256(file) == truth(file)
