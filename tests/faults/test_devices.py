"""One of two training processes is killed, or all are stopped: one message, no process left, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows

pytestmark = pytest.mark.skipif(
    not os.environ.get("REFSCORE_DEVICES"), reason="minutes of trainings in two processes: make test-devices"
)
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "160",
}  # fmt: skip
# when: seconds after both are there, or the step of the newest checkpoint; who: a rank, the launcher, or all as by Ctrl-C
MOMENTS = {
    "before the first step": (0.5, None, 1, signal.SIGKILL),
    "the first, early": (3.0, None, 0, signal.SIGKILL),
    "after a checkpoint": (None, 5, 1, signal.SIGKILL),
    "the first, after a checkpoint": (None, 5, 0, signal.SIGKILL),
    "after another": (None, 10, 1, signal.SIGKILL),
    "near the end": (None, 20, 0, signal.SIGKILL),
    "interrupted": (None, 10, "all", signal.SIGINT),
    "stopped": (None, 10, "launcher", signal.SIGTERM),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    where = tmp_path_factory.mktemp("devices")
    data = write_rows(where / "d.jsonl", preference_rows(40))
    train = {
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "save_steps": 5,
        "eval_steps": 10,
        "learning_rate": 1e-4,
    }
    experiment(where, tiny_model, data, train=train)
    refscore_here(where, "precompute", "--config", "experiment.yaml", "--run", "calm")
    assert started(where, "calm").wait() == 0
    return where


def started(where, run, *more, **variables):
    command = ["train", "--config", "experiment.yaml", "--run", run, "--devices", "2", *more]
    with (where / f"{run}.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.cli", *command],
            cwd=where, env={**ENVIRONMENT, **variables}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def below(parent):
    """Process numbers of the ranks, the first one first."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [variable for variable in variables if variable.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = int(status.parent.name)
    return [found[rank] for rank in sorted(found)]


def wait_for(reached, launcher, seconds=240):
    until = time.monotonic() + seconds
    while not reached():
        assert launcher.poll() is None, "it ended before"
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.1)


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_ends_one_process_ends_all_with_one_message_and_nothing_is_lost(place, moment):
    seconds, step, who, number = MOMENTS[moment]
    run = moment.replace(" ", "-").replace(",", "")
    checkpoints = place / f"data/runs/{run}/checkpoints"
    launcher = started(place, run)
    wait_for(lambda: len(below(launcher.pid)) == 2, launcher)
    if step is None:
        time.sleep(seconds)
    else:
        wait_for((checkpoints / f"step_{step:06d}").is_dir, launcher)
    ranks = below(launcher.pid)
    if who == "all":
        os.killpg(launcher.pid, number)
    else:
        os.kill(launcher.pid if who == "launcher" else ranks[who], number)
    assert launcher.wait(timeout=30) == 1
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    one_message_and_nothing_lost(place, run)


def one_message_and_nothing_lost(place, run, *more):
    """What is said of an ended training, and that the same command goes on to what an undisturbed one gives."""
    errors = [line for line in (place / f"{run}.txt").read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, errors
    assert "goes on" in errors[0] or "begins again" in errors[0]
    assert "Traceback" not in (place / f"{run}.txt").read_text()
    assert started(place, run, *more).wait() == 0
    calm, again = (place / f"data/runs/{name}/model/model.safetensors" for name in ("calm", run))
    assert calm.read_bytes() == again.read_bytes()


# in every process before anything else: one of them ends itself, or has a full disk, the second time that a moment of a protocol comes
DIES = """
import errno, os, signal
if os.environ.get("RANK") == os.environ.get("DIES"):
    from pipeline.artifacts import durable
    times = []
    def reached(point):
        if point == os.environ["AT"]:
            times.append(point)
            if len(times) == 2 and os.environ.get("FULL"):
                raise OSError(errno.ENOSPC, "No space left on device")
            if len(times) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    durable.reached = reached
"""


@pytest.mark.parametrize("behind", ["false", "true"], ids=["at once", "behind"])
@pytest.mark.parametrize(
    ("rank", "point"),
    [(1, "checkpoint: parts written"), (0, "checkpoint: state written"), (0, "checkpoint: renamed")],
)
def test_a_process_that_ends_while_a_checkpoint_is_written_loses_that_alone(place, rank, point, behind):
    (place / "dies").mkdir(exist_ok=True)
    (place / "dies/sitecustomize.py").write_text(DIES)
    run, more = f"{point[12:].replace(' ', '-')}-{behind}", ("--set", f"train.async_save={behind}")
    path = os.pathsep.join([str(place / "dies"), str(ROOT)])
    assert started(place, run, *more, DIES=str(rank), AT=point, PYTHONPATH=path).wait(timeout=240) == 1
    steps = sorted(each.name for each in (place / f"data/runs/{run}/checkpoints").glob("step_*"))
    assert ("step_000010" if point == "checkpoint: renamed" else "step_000005") in steps
    one_message_and_nothing_lost(place, run, *more)
    left = [each.name for each in (place / f"data/runs/{run}/checkpoints").iterdir()]
    assert left == ["step_000030"]


@pytest.mark.parametrize("behind", ["false", "true"], ids=["at once", "behind"])
def test_a_full_disk_of_one_process_is_one_message_and_leaves_nothing_there(place, behind):
    (place / "dies").mkdir(exist_ok=True)
    (place / "dies/sitecustomize.py").write_text(DIES)
    run, more = f"full-{behind}", ("--set", f"train.async_save={behind}")
    path = os.pathsep.join([str(place / "dies"), str(ROOT)])
    full = {"DIES": "1", "AT": "checkpoint: parts written", "FULL": "1", "PYTHONPATH": path}
    assert started(place, run, *more, **full).wait(timeout=240) == 1
    checkpoints = place / f"data/runs/{run}/checkpoints"
    assert [each.name for each in checkpoints.iterdir()] == ["step_000005"]
    said = (place / f"{run}.txt").read_text()
    assert said.count("error:") == 1
    assert "no space left to write" in said
    assert started(place, run, *more).wait() == 0
    calm, again = (place / f"data/runs/{name}/model/model.safetensors" for name in ("calm", run))
    assert calm.read_bytes() == again.read_bytes()
