"""Working files of a process go with it, also after a kill; what a disk refuses is told of the file that it was."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError
from tests.conftest import ROOT

WORKING = """
import os, signal, sys, tempfile
from pathlib import Path
from pipeline.artifacts.durable import scratch_place
assert scratch_place() == scratch_place()
place = tempfile.mkdtemp(dir=scratch_place())
Path(place, "pairs.parquet").touch()
print(scratch_place(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def worked(how):
    done = subprocess.run(
        [sys.executable, "-c", WORKING, how], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )  # fmt: skip
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0), done.stderr
    return Path(done.stdout.strip())


def test_working_files_go_with_their_process_or_with_the_next(tmp_path):
    assert not worked("ended").exists()
    killed = worked("killed")
    assert killed.is_relative_to(tmp_path / "data/cache")
    assert list(killed.rglob("pairs.parquet"))
    elsewhere = killed.with_name("4194999-another0")
    elsewhere.mkdir()
    alive = killed.with_name(f"{os.getpid()}-{killed.name.partition('-')[2]}")
    alive.mkdir()
    worked("ended")
    assert sorted(killed.parent.iterdir()) == sorted([elsewhere, alive])


def test_a_place_that_cannot_be_made_is_the_systems(tmp_path):
    (tmp_path / "data").write_text("")
    assert durable.scratch_place() is None


def refused(path):
    return PermissionError(errno.EACCES, "Permission denied", str(path))


def test_what_is_refused_is_told_of_the_file_that_it_was(tmp_path):
    out = tmp_path / "out" / "x.parquet"
    for path in (out, out.parent / ".tmp-1-x", out / "below"):
        with pytest.raises(RefscoreError, match=r"x\.parquet cannot be written"), durable.explaining_disk(out):
            raise refused(path)
    with pytest.raises(PermissionError), durable.explaining_disk(out):
        raise refused(tmp_path / "data.jsonl")


def test_a_directory_that_cannot_be_made_is_a_message(tmp_path, monkeypatch):
    def mkdir(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RefscoreError, match=r"below/x cannot be written \(Read-only file system\)"):
        durable.write_text(tmp_path / "below" / "x", "")


def test_a_directory_below_what_holds_none_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", Path("/proc/none/x"), tmp_path / ("long" * 100) / "x"):
        with pytest.raises(RefscoreError, match=r" cannot be made \(.+\): choose another place"):
            durable.write_text(place, "")


def test_a_fork_does_not_take_its_parents_working_files_along(tmp_path):
    code = WORKING.replace("if sys", "if not os.fork(): sys.exit()\nos.wait(); assert os.path.isdir(place)\nif sys")
    done = subprocess.run(
        [sys.executable, "-c", code, "ended"], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
