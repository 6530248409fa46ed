"""Every stage stopped at three moments, on disks that fill up, and beside another writer: a message, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.faults.conftest import EVERYTHING
from tests.forked import COMMAND, Forked, run

# how long each step took is not the same twice
SETTLED = pl.exclude("step_seconds", "tokens_per_second", "peak_memory_gib")
RESULTS = {"precompute": "pairs.parquet", "train": "metrics.parquet", "eval": "judgements.parquet"}

# when a function of a module is called for the n-th time, or with an argument that holds a text, the process signals itself
STOPPING = """
import importlib, os, signal, sys, time
module, name, when, number = sys.argv[1:5]
sys.argv = ["refscore", *sys.argv[5:]]
owner = importlib.import_module(module)
*outer, name = name.split(".")
for part in outer:
    owner = getattr(owner, part)
inner, seen = getattr(owner, name), [0]
def counting(*args, **kwargs):
    due = [*map(str, args)] if not when.isdigit() else [when] * (seen[0] == int(when) - 1)
    seen[0] += 1
    if any(when in text for text in due):
        os.kill(os.getpid(), int(number))
        time.sleep(5 * (int(number) != signal.SIGSTOP))
    return inner(*args, **kwargs)
setattr(owner, name, counting)
from stages.cli import main
main()
"""
MOMENTS = {
    "precompute": {
        "planning": ("stages.precompute", "Planning", "1"),
        "scoring": ("pipeline.engines.transformers", "TransformersScorer.score", "4"),
        "writing the pairs": ("pipeline.artifacts.durable", "flush", "-pairs.parquet"),
    },
    "train": {
        "loading the policy": ("pipeline.training.train", "load_policy", "1"),
        "taking a step": ("pipeline.training.loop", "accumulate", "4"),
        "writing a checkpoint": ("pipeline.artifacts.durable", "reached", "checkpoint: optimizer written"),
        "saving the model": ("pipeline.training.save", "outputs_of", "1"),
    },
    "eval": {
        "judging pairs": ("pipeline.evaluation.evaluate", "judge_pairs", "1"),
        "sampling": ("pipeline.evaluation.sampling", "sample_rows", "1"),
        "judging texts": ("pipeline.evaluation.evaluate", "judge_texts", "1"),
    },
}
# the tests, beside `make faults`, try these
SOME = {("precompute", "writing the pairs", "SIGTERM"), ("train", "writing a checkpoint", "SIGINT")}


def refscore(where, stage, moment=None, number=signal.SIGTERM):
    """Run a stage of run `r` in a process of its own, which signals itself at a moment."""
    code = (STOPPING, *moment, int(number)) if moment else (COMMAND,)
    done = run(where, *code, stage, "--config", "experiment.yaml", "--run", "r")
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert "a bug in refscore" not in done.stderr
    return done


def run_through(where, stages):
    """Run stages that nothing comes between: those that start no engine of vLLM in this process."""
    for stage in stages:
        if stage == "eval":
            done = refscore(where, stage)
            assert done.returncode == 0, done.stderr
        else:
            refscore_here(where, stage, "--config", "experiment.yaml", "--run", "r")


def result(where, stage):
    return pl.read_parquet(where / "data/runs/r" / RESULTS[stage]).select(SETTLED)


def must_equal(where, inputs, stage):
    """What was scored again stands in other batches, which moves the last digits; everything else is the same to the bit."""
    close = {"abs_tol": 1e-4} if stage == "precompute" else {"check_exact": True}
    assert_frame_equal(result(where, stage), result(inputs, stage), **close)


def before(stage):
    return list(RESULTS)[: list(RESULTS).index(stage)]


def leftovers(where):
    """Hidden files, and working directories other than this process's own, which is removed when it ends."""
    work = [path for path in (where / "data/cache/work").glob("*") if not path.name.startswith(f"{os.getpid()}-")]
    return [*(where / "data/runs").rglob(".*"), *work]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_model):
    """A directory with a configuration and data, and what the stages make of them if nothing comes between."""
    where = tmp_path_factory.mktemp("whole")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    train = {"max_steps": 6, "save_steps": 2, "eval_steps": 0}
    experiment(where, tiny_model, data, reference={"tokens_per_shard": 300}, train=train)
    run_through(where, ["precompute", "train", "eval"] if EVERYTHING else ["precompute", "train"])
    return where


@pytest.fixture
def where(inputs, tmp_path):
    (tmp_path / "experiment.yaml").write_text((inputs / "experiment.yaml").read_text())
    return tmp_path


CASES = [
    pytest.param(
        stage, moment, name, marks=[pytest.mark.engine] if stage == "eval" else [], id=f"{stage}-{moment}-{name}"
    )
    for stage, moments in MOMENTS.items()
    for moment in moments
    for name in ("SIGINT", "SIGTERM")
    if EVERYTHING or (stage, moment, name) in SOME
]


@pytest.mark.parametrize(("stage", "moment", "name"), CASES)
def test_a_stage_that_is_stopped_says_how_it_goes_on_and_does(inputs, where, case, stage, moment, name):
    run_through(where, before(stage))
    done = refscore(where, stage, moment=MOMENTS[stage][moment], number=signal.Signals[name])
    how = "interrupted; " if name == "SIGINT" else f"stopped by {name}; "
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {how}"), done.stderr
    assert "goes on from" in done.stderr or "begins again" in done.stderr
    assert leftovers(where) == []
    run_through(where, [stage])
    must_equal(where, inputs, stage)
    case(f"SIGINT or SIGTERM in {stage}, at a named moment")


@pytest.fixture
def small_disk(where):
    """`data/` on a file system of its own, and a function that leaves so many bytes of it free (None: enough)."""
    place = where / "data"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")

    def leave(free: int | None) -> None:
        held = os.statvfs(place)
        used = (held.f_blocks - held.f_bfree) * held.f_frsize
        size = 64 * 2**20 if free is None else used + free
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)

    yield leave
    subprocess.run(["umount", "-l", place], check=True)


# bytes that are left: nothing, some small files, and so on until a stage has enough
FREE = {
    "precompute": [4096, 16_384, 28_672, 45_056],
    "train": [4096, 40_960, 131_072, 409_600, 1_228_800, 1_638_400],
    "eval": [4096, 16_384, 65_536, 262_144],
}


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[pytest.mark.engine] if stage == "eval" else []) for stage in FREE if EVERYTHING or stage != "eval"]
)  # fmt: skip
@pytest.mark.timeout(1800)
def test_a_disk_that_fills_up_is_a_message_and_the_stage_goes_on_when_there_is_room(
    inputs, where, case, small_disk, stage
):
    run_through(where, before(stage))
    met = 0
    for free in FREE[stage] if EVERYTHING else FREE[stage][1:2]:
        small_disk(free)
        done = refscore(where, stage)
        if done.returncode == 0:
            break
        met += 1
        assert done.returncode == 1, done.stderr
        assert "no space left to write" in done.stderr, done.stderr
        assert leftovers(where) == []
        case(f"disk full in {stage}")
    assert met
    small_disk(None)
    run_through(where, [stage])
    must_equal(where, inputs, stage)


@pytest.mark.parametrize("stage", ["precompute", "train"] if EVERYTHING else ["precompute"])
def test_a_disk_that_cannot_be_written_is_a_message(where, case, small_disk, stage):
    run_through(where, before(stage))
    subprocess.run(["mount", "-o", "remount,ro", where / "data"], check=True)
    done = refscore(where, stage)
    assert done.returncode == 1
    assert "cannot be written (Read-only file system)" in done.stderr
    case(f"read-only disk in {stage}")


def state_of(pid):
    """What a process does, in a letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_of_two_writers_at_once_one_is_refused(inputs, where, case):
    run_through(where, before("train"))
    command = ("train", "--config", "experiment.yaml", "--run", "r")
    first = Forked(where, STOPPING, *MOMENTS["train"]["taking a step"], int(signal.SIGSTOP), *command)
    while first.returncode is None and state_of(first.pid) != "T":
        time.sleep(0.05)
    try:
        refused = run(where, COMMAND, *command)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert refused.returncode == 1
    assert f"run 'r' is being written by process {first.pid} on " in refused.stderr
    said = first.communicate(timeout=300)
    assert first.returncode == 0, said
    assert result(where, "train").equals(result(inputs, "train"))
    log = (Path(where) / "data/runs/r/log.txt").read_text()
    assert log.count("$ refscore train") == 1
    case("two trainings of one run at once")
