"""A shelf stays within its bytes, spares what is in use by any process that lives, and never shows half a file."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.artifacts import shelf as module
from pipeline.artifacts.digests import file_stamp
from pipeline.artifacts.shelf import Shelf, cache_limit
from pipeline.errors import ConfigError, RefscoreError
from tests.conftest import ROOT


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "shelf", 1000)


def put(shelf, name, size=100):
    shelf.put(name, lambda path: path.write_bytes(name[:1].encode() * size))


def names(shelf):
    return sorted(path.name for path in shelf.directory.iterdir() if not path.name.startswith("."))


def used_long_ago(shelf, *names):
    for age, name in enumerate(reversed(names), 1):
        os.utime(shelf.directory / ".shelf" / "used" / name, (time.time() - 100 * age,) * 2)
        os.utime(shelf.directory / name, (time.time() - 100 * age,) * 2)


def test_what_was_put_is_there_and_what_was_not_is_none(shelf):
    with shelf.using("a") as path:
        assert path is None
    assert not shelf.directory.exists()
    put(shelf, "a")
    with shelf.using("a") as path:
        assert path.read_bytes() == b"a" * 100
    assert shelf.bytes == 100
    shelf.put("a", lambda path: path.write_bytes(b"anew"))
    assert (shelf.directory / "a").read_bytes() == b"anew"
    assert shelf.bytes == 4


def test_the_least_recently_used_goes_first(shelf):
    for name in "abcdefghi":
        put(shelf, name)
    used_long_ago(shelf, *"abcdefghi")
    with shelf.using("a"):
        pass
    put(shelf, "j", 200)
    # down to nine tenths, of which the new one is part
    assert names(shelf) == ["a", *"defghij"]
    assert shelf.bytes == 900


def test_a_use_does_not_change_what_a_files_digest_is_known_by(shelf):
    put(shelf, "a")
    time.sleep(0.1)
    before = file_stamp(shelf.directory / "a")
    with shelf.using("a"):
        pass
    assert file_stamp(shelf.directory / "a") == before


def test_what_is_in_use_stays_until_the_last_use_ends(shelf):
    put(shelf, "a")
    with shelf.using("a") as outer:
        with shelf.using("a"):
            pass
        for name in "bcdefghijklm":
            put(shelf, name)
        assert outer.read_bytes() == b"a" * 100
    used_long_ago(shelf, "a")
    put(shelf, "n", 300)
    assert "a" not in names(shelf)


USING = """
import sys, time
from pathlib import Path
from pipeline.artifacts.shelf import Shelf
with Shelf(Path(sys.argv[1]), 1000).using("a") as path:
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_another_process_keeps_what_it_uses_as_long_as_it_lives(shelf, killed):
    put(shelf, "a")
    process = subprocess.Popen(
        [sys.executable, "-c", USING, str(shelf.directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline().strip() == str(shelf.directory / "a")
        if killed:
            process.kill()
            process.wait()
        used_long_ago(shelf, "a")
        for name in "bcdefghijklm":
            put(shelf, name)
        assert ("a" in names(shelf)) != killed
        assert len(list((shelf.directory / ".shelf" / "users").iterdir())) == (0 if killed else 1)
    finally:
        process.kill()
        process.communicate()


def test_a_file_larger_than_the_limit_stays_until_the_next(shelf):
    put(shelf, "a", 5000)
    assert names(shelf) == ["a"]
    put(shelf, "b")
    assert names(shelf) == ["b"]


def test_notes_of_uses_that_ended_are_dropped_and_those_of_the_others_kept(shelf, monkeypatch):
    monkeypatch.setattr(module, "_LINES", 50)
    put(shelf, "a")
    put(shelf, "b")
    with shelf.using("a"):
        for _ in range(200):
            with shelf.using("b"):
                pass
        (notes,) = (shelf.directory / ".shelf" / "users").iterdir()
        assert len(notes.read_text().splitlines()) <= 60
        assert shelf._in_use() == {"a"}
    assert shelf._in_use() == set()
    module._end(shelf._notes, notes, os.getpid() + 1)  # in a fork
    assert notes.exists()
    other = Shelf(shelf.directory)
    with other.using("a"):
        pass
    assert len(list(notes.parent.iterdir())) == 2
    del other
    assert list(notes.parent.iterdir()) == [notes]


def test_making_makes_once(shelf):
    made = []
    for _ in range(2):
        with shelf.making("a", lambda path: made.append(path.write_bytes(b"a"))) as path:
            assert path.read_bytes() == b"a"
    assert len(made) == 1


def test_no_use_begins_while_another_removes(shelf):
    put(shelf, "a")
    seen = []

    def use():
        with shelf.using("a") as path:
            seen.append(path)

    with (shelf.directory / ".shelf" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        user = threading.Thread(target=use)
        user.start()
        user.join(0.2)
        assert user.is_alive()
        (shelf.directory / "a").unlink()
    user.join()
    assert seen == [None]


def test_a_failed_put_leaves_nothing(shelf):
    def failing(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RefscoreError, match="no space left"):
        shelf.put("a", failing)
    assert list(shelf.directory.iterdir()) == []


def test_leftovers_of_killed_writers_are_swept(shelf):
    put(shelf, "a", 900)
    old, new = (shelf.directory / f".tmp-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    used_long_ago(shelf, "a")
    put(shelf, "b", 900)
    assert names(shelf) == ["b"]
    assert not old.exists()
    assert new.exists()
    assert [path.name for path in (shelf.directory / ".shelf" / "used").iterdir()] == ["b"]


def test_without_locks_nothing_is_removed(shelf, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    for name in "abcdefghijklm":
        put(shelf, name)
    with shelf.using("a") as path:
        assert path.exists()
    assert len(names(shelf)) == 13


def test_where_nothing_may_be_written_files_are_used_all_the_same(shelf, monkeypatch):
    put(shelf, "a")

    def refusing(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "open", refusing)
    with shelf.using("a") as path:
        assert path.read_bytes() == b"a" * 100


def test_the_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv(module.LIMIT, raising=False)
    assert cache_limit() == 32 * 2**30
    monkeypatch.setenv(module.LIMIT, "0.5")
    assert cache_limit() == Shelf(ROOT)._limit == 2**29
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(module.LIMIT, wrong)
        with pytest.raises(ConfigError, match=rf"{module.LIMIT} is '{wrong}'.*give the GiB"):
            cache_limit()


SHARING = """
import random, sys
from pathlib import Path
from pipeline.artifacts.shelf import Shelf
draw, shelf = random.Random(sys.argv[2]), Shelf(Path(sys.argv[1]), 1000)
for _ in range(100):
    name = draw.choice("abcdefghijklmnopqrst")
    with shelf.making(name, lambda path: path.write_bytes(name.encode() * 100)) as path:
        for _ in range(3):
            assert path.read_bytes() == name.encode() * 100
"""


def test_many_processes_share_a_shelf(shelf):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, str(shelf.directory), str(number)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
        ) for number in range(4)
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    assert shelf.bytes <= 1000 + 4 * 100
    assert list((shelf.directory / ".shelf" / "users").iterdir()) == []
