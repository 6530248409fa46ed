"""Trainings of several cases one after the other in the processes that torchrun starts: `-m tests.training.many PLACE CASE...`.

Each case is a configuration PLACE/CASE.yaml whose run is named CASE-<world's size>, or after an `=`. The pairs are there already.
"""

import sys
import time
from pathlib import Path

from pipeline.artifacts.runs import open_run
from pipeline.config.files import load_config
from pipeline.errors import RefscoreError
from pipeline.progress import SILENT
from pipeline.training.parallel.world import world
from pipeline.training.train import train


class Spoken(type(SILENT)):
    """Lines go to the output; progress is not shown."""

    def say(self, text: str) -> None:
        """A line."""
        print(text, flush=True)


def main(cases: list[str]) -> None:
    """Train every case."""
    with world() as here:
        for case in cases:
            name, _, run = case.partition("=")
            config = load_config(Path(f"{name}.yaml"))
            try:
                train(config, open_run(run or f"{name}-{here.size}"), listener=Spoken(), world=here)
            except RefscoreError:
                # as the command does: the first one speaks before another's end stops it
                if not here.first:
                    time.sleep(5)
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
