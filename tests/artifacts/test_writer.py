"""One run, one writer: also after kills, without flock, and beside writers on other machines."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.artifacts import writer
from pipeline.artifacts.runs import Run
from pipeline.artifacts.writer import LOCK, one_writer, sweep, writer_of, writing
from pipeline.errors import RefscoreError
from tests.conftest import ROOT

HOLDING = """
import sys, time
from pathlib import Path
from pipeline.artifacts.runs import Run
from pipeline.artifacts.writer import writing
{patch}
with writing(Run(Path(sys.argv[1])), "refscore train --run x"):
    Path(sys.argv[1], "made").touch()
    {before}
    print("held", flush=True)
    time.sleep(60)
"""


def holding(directory, before="", patch=""):
    """A process that writes the run until it is ended."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDING.format(before=before, patch=patch), str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == "held\n"
    return child


def kill(child):
    child.kill()
    child.wait()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "runs" / "x")


def test_a_second_writer_is_refused_and_told_whose_run_it_is(run):
    child = holding(run.directory)
    try:
        with (
            pytest.raises(RefscoreError, match=rf"process {child.pid} on .* since 20.* UTC \(refscore train --run x\)"),
            writing(run),
        ):
            pass
        assert writer_of(run).pid == child.pid
    finally:
        kill(child)
    assert writer_of(run) is None


def test_a_killed_writers_run_is_taken_over_and_its_leftovers_are_swept(run):
    child = holding(run.directory, "Path(sys.argv[1], f'.tmp-{__import__(\"os\").getpid()}-aa-pairs.parquet').touch()")
    beside = run.directory / "checkpoints" / f".tmp-{child.pid}-bb-step_000002"
    beside.mkdir(parents=True)
    (beside / "model.safetensors").touch()
    of_a_reader = run.directory / f".tmp-{os.getppid()}-cc-verify.json"
    of_a_reader.touch()
    kill(child)
    assert (run.directory / LOCK).exists()
    with writing(run):
        assert writer_of(run).pid == os.getpid()
        # that of a process that lives stays
        assert list(run.directory.rglob(".tmp-*")) == [of_a_reader]
    assert not (run.directory / LOCK).exists()
    assert writer_of(run) is None


def test_blocks_of_one_thread_may_stand_inside_each_other_and_other_threads_are_refused(run):
    said = []

    @one_writer
    def by_name(number, run):
        assert writer_of(run)
        return number

    def elsewhere():
        try:
            with writing(run):
                said.append("written")
        except RefscoreError as error:
            said.append(str(error))

    with writing(run):
        with writing(run):
            pass
        assert writer_of(run)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "another thread of this process" in said[0]
    assert by_name(7, run=run) == 7
    assert writer_of(run) is None


def test_a_run_of_which_nothing_was_written_leaves_no_directory(run):
    with pytest.raises(ValueError), writing(run):
        raise ValueError
    assert not run.directory.exists()


def test_a_forked_child_does_not_hold_its_parents_lock(run):
    child = holding(
        run.directory,
        "import os\n    pid = os.fork()\n    (time.sleep(60), os._exit(0)) if not pid else Path(sys.argv[1], 'pid').write_text(str(pid))",
    )
    orphan = int((run.directory / "pid").read_text())
    kill(child)
    try:
        with writing(run):
            os.kill(orphan, 0)  # it is there still
    finally:
        os.kill(orphan, signal.SIGKILL)


WITHOUT = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


def test_without_flock_the_record_decides(run, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(writer.fcntl, "flock", flock)
    child = holding(run.directory, patch=WITHOUT)
    try:
        with pytest.raises(RefscoreError, match=f"process {child.pid}"), writing(run):
            pass
    finally:
        kill(child)
    with writing(run):
        assert writer_of(run).pid == os.getpid()


def of_another_machine(run):
    run.directory.mkdir(parents=True)
    record = {
        "host": "far",
        "pid": 1,
        "command": "refscore eval",
        "since": "2026-01-01T00:00:00+00:00",
        "machine": "other",
    }
    (run.directory / LOCK).write_text(json.dumps({**record, "began": "5", "token": "t"}))


def test_a_writer_elsewhere_that_shows_life_is_left_alone(run, monkeypatch):
    of_another_machine(run)
    monkeypatch.setattr(writer, "_SIGN_OF_LIFE", 5.0)
    assert writer_of(run).host == "far"
    threading.Timer(0.5, (run.directory / LOCK).touch).start()
    with pytest.raises(RefscoreError, match="process 1 on far"), writing(run):
        pass


def test_a_writer_elsewhere_that_shows_no_life_is_taken_over(run, monkeypatch):
    of_another_machine(run)
    monkeypatch.setattr(writer, "_SIGN_OF_LIFE", 0.5)
    with writing(run):
        assert writer_of(run).host != "far"


def test_a_writer_shows_life(run, monkeypatch):
    monkeypatch.setattr(writer, "_TOUCH_SECONDS", 0.05)
    with writing(run):
        os.utime(run.directory / LOCK, (1000, 1000))
        time.sleep(0.5)
        assert (run.directory / LOCK).stat().st_mtime > 1000


def test_a_lock_file_that_was_removed_and_made_anew_is_taken_at_its_name(run, monkeypatch):
    """Who waits for a file must not hold it under no name while another holds the new one."""
    real = writer._flock
    seen = []

    def flock(descriptor):
        if not seen:
            seen.append(descriptor)
            (run.directory / LOCK).unlink()
        return real(descriptor)

    monkeypatch.setattr(writer, "_flock", flock)
    with writing(run):
        assert json.loads((run.directory / LOCK).read_text())["pid"] == os.getpid()


def test_sweeping_takes_no_file_of_a_living_process(tmp_path):
    alive = tmp_path / f".tmp-{os.getppid()}-a-x"
    gone = tmp_path / ".tmp-4194999-a-x"
    alive.touch()
    gone.touch()
    assert sweep(tmp_path) == [gone]
    assert sorted(Path(tmp_path).iterdir()) == [alive]
