"""Stages one after the other, each in a process of its own: one model in memory at a time, and none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import RefscoreError
from stages import console


def step(stage: str, config: Path, run: str, overrides: Sequence[str]) -> None:
    """Run one stage as the command line would. Raises with the stage's own exit code if it fails."""
    options = [part for override in overrides for part in ("--set", override)]
    command = [stage, "--config", str(config), "--run", run, *options, *console.as_asked()]
    console.say(f"\nrefscore {' '.join(command)}")
    sys.stdout.flush()
    # the same code, wherever this process found it
    here = str(Path(__file__).resolve().parents[1 + str(__package__).count(".")])
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.cli", *command], env={**os.environ, "PYTHONPATH": path}
    ) as child:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            # it says how it goes on, and leaves nothing half done: that takes a moment
            child.terminate()
            child.wait()
            raise
    if code:
        failed = RefscoreError(
            f"'refscore {stage}' of run {run!r} failed, see above; once mended, the same command goes on"
        )
        failed.exit_code = code
        raise failed
