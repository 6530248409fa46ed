"""Digests are remembered while nothing says that a file changed; what could hide a change is not trusted."""

import hashlib
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.artifacts import digests
from tests.conftest import ROOT


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"a" * 1000)
    settle()
    return path


def settle():
    """Let the moment pass in which a file could change again without another time."""
    time.sleep(2 * digests._TICK / 1e9)


def truth(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_known_file_is_not_read_again(file, monkeypatch):
    assert digests.unread_bytes([file]) == 1000
    seen = []
    assert digests.files_sha256([file], seen.append) == {file: truth(file)}
    assert sum(seen) == 1000
    assert digests.unread_bytes([file]) == 0
    other = file.with_name("other")
    other.write_bytes(b"b" * 10)
    settle()
    # a new one beside it is read, and the known one is not
    read = digests._sha256
    monkeypatch.setattr(
        digests, "_sha256", lambda path, heard: read(path, heard) if path == other else pytest.fail("read again")
    )
    assert digests.files_sha256([file, other]) == {file: truth(file), other: truth(other)}
    # if files can be written, the mount says nothing
    monkeypatch.setattr(digests, "_mount_of", lambda _: pytest.fail("asked for the mount"))
    assert digests.file_sha256(file) == truth(file)


@pytest.mark.parametrize("change", ["size", "mtime", "inode", "in place"])
def test_any_difference_reads_it_again(file, change):
    before = digests.file_sha256(file)
    assert digests.unread_bytes([file]) == 0
    status = file.stat()
    if change == "size":
        file.write_bytes(b"a" * 1001)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "mtime":
        file.write_bytes(b"b" * 1000)
    elif change == "in place":
        with file.open("r+b") as content:
            content.write(b"b")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        now = file.stat()
        assert (now.st_size, now.st_mtime_ns, now.st_ino) == (status.st_size, status.st_mtime_ns, status.st_ino)
    else:
        other = file.with_name("other")
        other.write_bytes(b"b" * 1000)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)
    settle()
    assert digests.file_sha256(file) == truth(file) != before


@pytest.mark.parametrize("when", ["epoch", "future", "now"])
def test_times_that_could_hide_a_change_are_not_trusted(file, when):
    seconds = {"epoch": 1.5, "future": time.time() + 1000, "now": time.time() + 0.01}[when]
    os.utime(file, (seconds, seconds))
    if when != "now":
        settle()
    assert digests.file_sha256(file) == truth(file)
    assert digests.unread_bytes([file]) == 1000


def test_the_moment_in_which_a_change_could_hide_is_that_of_the_file_systems_clock(file, monkeypatch):
    """Whole seconds are times of a coarse file system: two of them must have passed, not a twentieth."""
    whole = int(time.time())
    os.utime(file, (whole, whole))
    settle()
    assert digests.file_stamp(file) is None
    os.utime(file, (whole - 3, whole - 3))
    settle()
    assert digests.file_stamp(file)
    # to the nanosecond
    for changed, tick in ((whole * 10**9 + 7, digests._TICK), (whole * 10**9, digests._COARSE_TICK)):
        os.utime(file, ns=(changed, changed))
        status = file.stat()
        fake = SimpleNamespace(
            **{name: getattr(status, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")},
            st_ctime_ns=changed,
        )
        monkeypatch.setattr(type(file), "stat", lambda self, *_, fake=fake, **__: fake)
        for since, trusted in ((tick - 1, False), (tick, True)):
            monkeypatch.setattr(digests.time, "time_ns", lambda now=changed + since: now)
            assert bool(digests.file_stamp(file)) == trusted
        monkeypatch.undo()


def test_what_is_older_than_ten_years_of_the_clock_is_no_time(file):
    for seconds, trusted in ((digests._NO_TIME - 1, False), (digests._NO_TIME, True)):
        os.utime(file, (seconds, seconds))
        settle()
        assert bool(digests.file_stamp(file)) == trusted


def test_a_file_that_changes_while_it_is_read_is_not_remembered(file, monkeypatch):
    read = digests._sha256

    def changing(path, on_bytes):
        digest = read(path, on_bytes)
        path.write_bytes(b"b" * 1000)
        return digest

    monkeypatch.setattr(digests, "_sha256", changing)
    digests.file_sha256(file)
    assert not digests.MEMORY.exists()
    monkeypatch.setattr(digests, "_sha256", read)
    settle()
    assert digests.file_sha256(file) == truth(file)


def test_a_stamp_is_given_again_to_a_file_that_kept_it_only(file):
    stamp = digests.file_stamp(file)
    assert digests.unchanged_stamp(file, stamp) == stamp
    assert digests.unchanged_stamp(file, None) is None
    file.write_bytes(b"b")
    settle()
    assert digests.unchanged_stamp(file, stamp) is None
    file.unlink()
    assert digests.unchanged_stamp(file, stamp) is None


@pytest.mark.parametrize("damage", ["no database", "torn", "another table", "empty"])
def test_a_memory_that_is_damaged_is_begun_anew(file, damage, caplog, monkeypatch):
    # a library that sets up its own log may have switched this one off
    monkeypatch.setattr(digests.log, "disabled", False)
    caplog.set_level("DEBUG", logger=digests.log.name)
    assert digests.file_sha256(file) == truth(file)
    if damage == "no database":
        digests.MEMORY.write_text("{broken" * 1000)
    elif damage == "torn":
        content = digests.MEMORY.read_bytes()
        digests.MEMORY.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif damage == "another table":
        digests.MEMORY.unlink()
        with closing(sqlite3.connect(digests.MEMORY)) as memory:
            memory.execute("CREATE TABLE digests (stamp TEXT)")
    else:
        digests.MEMORY.write_bytes(b"")
    assert digests.unread_bytes([file]) == 1000
    assert digests.file_sha256(file) == truth(file)
    assert ("begun anew" in caplog.text) == (damage != "empty")
    assert digests.unread_bytes([file]) == 0


@pytest.mark.parametrize("obstacle", ["a directory", "no directory", "locked", "read only"])
def test_a_memory_that_cannot_be_read_or_written_costs_time_only(file, obstacle, monkeypatch):
    monkeypatch.setattr(digests, "_PATIENCE", 0.1)
    if obstacle == "a directory":
        digests.MEMORY.mkdir(parents=True)
    elif obstacle == "no directory":
        digests.MEMORY.parent.parent.mkdir()
        digests.MEMORY.parent.write_text("")
    elif obstacle == "read only":
        connect = sqlite3.connect
        monkeypatch.setattr(
            digests.sqlite3, "connect", lambda path, **words: connect(f"file:{path}?mode=ro", uri=True, **words)
        )
    else:
        digests.file_sha256(file)
        file.write_bytes(b"b" * 1000)
        settle()
        with closing(sqlite3.connect(digests.MEMORY)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert digests.file_sha256(file) == truth(file)
            assert digests.unread_bytes([file]) == 1000
    assert digests.file_sha256(file) == truth(file)


def test_thousands_of_files_are_one_question_and_none_is_forgotten(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}" for number in range(11_000)]
    stamps = {path: f"stamp of {path}" for path in files}
    digests._remember(dict.fromkeys(stamps.values(), "ab"))
    monkeypatch.setattr(digests, "file_stamp", stamps.__getitem__)
    connect, connections = sqlite3.connect, []
    monkeypatch.setattr(
        digests.sqlite3, "connect", lambda *given, **words: connections.append(given) or connect(*given, **words)
    )
    assert digests.files_sha256(files) == dict.fromkeys(files, "ab")
    assert len(connections) == 1


def test_what_nobody_asks_for_is_forgotten_and_what_is_asked_for_is_not(file, monkeypatch):
    other = file.with_name("other")
    other.write_bytes(b"b")
    settle()
    digests.files_sha256([file, other])
    today = digests._today()
    for later in (60, 120):
        monkeypatch.setattr(digests, "_today", lambda later=later: today + later)
        assert digests.unread_bytes([file]) == 0
    digests._remember({"another": "00"})
    assert digests.unread_bytes([file, other]) == 1


REMEMBERING = """
import sys
from pipeline.artifacts import digests
digests._PATIENCE = 200.0  # a machine that is busy otherwise keeps them waiting
for number in range(100):
    name = f"{sys.argv[1]}.{number}"
    digests._remember({name: name})
    assert digests._remembered([name]) == {name: name}
"""


def test_many_processes_remember_at_once(tmp_path):
    digests.MEMORY.parent.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", REMEMBERING, str(number)], env=environment, stderr=subprocess.PIPE)
        for number in range(4)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    names = [f"{process}.{number}" for process in range(4) for number in range(100)]
    assert digests._remembered(names) == dict(zip(names, names, strict=True))


def test_a_name_that_is_no_text_is_remembered(tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.safetensors"))
    odd.write_bytes(b"a" * 10)
    settle()
    assert digests.file_sha256(odd) == truth(odd)
    assert digests.unread_bytes([odd]) == 0


@pytest.mark.parametrize("kernel", ["names mounts", "names none"])
def test_images_with_reproducible_times_mounted_in_turn_at_one_path_are_told_apart(tmp_path, kernel, monkeypatch):
    if not shutil.which("mksquashfs"):
        pytest.skip("mksquashfs is not installed: a read-only file system without an image is tested below")
    if kernel == "names none":
        monkeypatch.setattr(digests, "_mount_of", lambda _: None)
    place = tmp_path / "mounted"
    place.mkdir()
    found = []
    for content in (b"a", b"b"):
        source, image = tmp_path / content.decode(), tmp_path / f"{content.decode()}.squashfs"
        source.mkdir()
        (source / "w.safetensors").write_bytes(content * 1000)
        subprocess.run(
            ["mksquashfs", source, image, "-all-time", "1600000000", "-mkfs-time", "1600000000", "-quiet", "-no-progress"],
            check=True, capture_output=True,
        )  # fmt: skip
        if subprocess.run(["mount", "-o", "loop", image, place], check=False, capture_output=True).returncode:
            pytest.skip("mounting an image needs root and loop devices")
        try:
            found.append((digests.file_sha256(place / "w.safetensors"), truth(place / "w.safetensors")))
            assert (digests.unread_bytes([place / "w.safetensors"]) == 0) == (kernel == "names mounts")
        finally:
            subprocess.run(["umount", place], check=True)
    assert all(ours == theirs for ours, theirs in found)
    assert found[0] != found[1]


def test_a_file_on_a_read_only_mount_is_known_by_the_mount(file, monkeypatch):
    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(digests.os, "statvfs", lambda _: ReadOnly)
    mounts = iter(["first", "first", "first", "second"])
    monkeypatch.setattr(digests, "_mount_of", lambda path: next(mounts) if path == file else pytest.fail("of another"))
    digests.file_sha256(file)
    assert digests.unread_bytes([file]) == 0
    assert digests.unread_bytes([file]) == 1000
    monkeypatch.setattr(digests, "_mount_of", lambda _: None)
    assert digests.file_stamp(file) is None


def test_every_mount_has_a_name_of_its_own(tmp_path):
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 8):
        pytest.skip("this kernel names no mounts (before Linux 6.8)")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    name, other = digests._mount_of(tmp_path), digests._mount_of("/proc")
    assert re.fullmatch(rf"{boot}\.[1-9]\d*", name)
    assert name == digests._mount_of(tmp_path)
    assert name != other
    # numbers given one after the other from 2 ** 31 on: small ones, if read in the right order of bytes
    assert all(int(one.partition(".")[2]) < 2**40 for one in (name, other))
    assert digests._mount_of(tmp_path / "absent") is None
    # a link is a file of the mount that it leads to
    (tmp_path / "link").symlink_to("/proc")
    assert digests._mount_of(tmp_path / "link") == digests._mount_of(Path("link")) == other


def test_a_kernel_that_fills_nothing_in_names_no_mount(tmp_path, monkeypatch):
    """Before Linux 6.8: the call succeeds, and its mask says that the mount is not among the answers."""
    monkeypatch.setattr(digests.ctypes, "CDLL", lambda _: SimpleNamespace(statx=lambda *_: 0))
    assert digests._mount_of(tmp_path) is None
