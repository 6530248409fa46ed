"""Stage two: train the policy alone against the stored reference scores, on one device or on many."""

from __future__ import annotations

import time

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.errors import RefscoreError
from pipeline.progress import SILENT
from pipeline.training.parallel.world import Followed, world
from pipeline.training.train import train
from stages import console

# seconds that a process leaves to the first one to say what went wrong in all, before it says what did in itself
_AFTER_THE_FIRST = 5.0


def main(config: Config, run: Run, *, restart: bool) -> None:
    """Train, and say how it goes; together with the processes that torchrun started beside this one, if it did."""
    with world() as here:
        try:
            train(config, run, restart=restart, listener=console.working if here.first else SILENT, world=here)
        except RefscoreError as error:
            if not here.first and not isinstance(error, Followed):
                time.sleep(_AFTER_THE_FIRST)
            raise
