"""One process per device of this machine, started by torch's own launcher (`torch.distributed.run`), and how they end."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, RefscoreError
from pipeline.hardware import device_kind, processors
from stages import ending

if TYPE_CHECKING:
    from pipeline.artifacts.runs import Run


class Said(RefscoreError):
    """A process below failed and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


def inside() -> bool:
    """Whether a launcher, this one or another, has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def writing_alone(run: Run) -> AbstractContextManager[None]:
    """What stands around a stage that many processes may run: the first one writes the run and its log."""
    if int(os.environ.get("RANK", "0")) == 0:
        return ending.working_on(run, ending.from_a_checkpoint)
    return ending.interruptible(lambda: ending.from_a_checkpoint(run))


def launch(devices: int, arguments: list[str], how: Callable[[], str]) -> None:
    """Run `refscore` with `arguments` in as many processes as `devices`, until all have ended. `how` says where it goes on.

    Raises ConfigError if there are not so many devices, Interrupted if somebody stopped it, RefscoreError if a process was killed,
    Said with its exit code if one failed and said so.
    """
    _must_be_there(devices)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what failed is said below, once and in words
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    here = str(Path(__file__).resolve().parents[1 + str(__package__).count(".")])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ[ending.LAUNCHED] = "1"
    if device_kind() == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(processors()) // devices)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=f"refscore-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", f"{__package__}.cli", *arguments)
    except SignalException as stop:
        name = signal.Signals(stop.sigval).name
        raise ending.Interrupted(f"{ending.how_stopped(name)}; {how()}") from None
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            raise Said(failure.exitcode) from None
        name = signal.Signals(-failure.exitcode).name
        raise RefscoreError(
            f"the process of device {rank} was ended by {name}{_perhaps(name)}; the others were ended with it. The same command "
            "goes on after the last checkpoint"
        ) from None
    finally:
        # it is said of the processes below
        os.environ.pop(ending.LAUNCHED, None)


def _perhaps(name: str) -> str:
    return " (the system does so if memory runs out)" if name == "SIGKILL" else ""


def _must_be_there(devices: int) -> None:
    if device_kind() == "cpu":
        # each process takes memory for libraries of its own, and more of them than processors are slower
        there, what = len(processors()), "processors"
    else:
        import torch

        there, what = torch.cuda.device_count(), "GPUs"
    if devices > there:
        raise ConfigError(f"--devices {devices}: this machine has {there} {what}")
