"""Stage two: train the policy alone against the stored reference scores."""

from __future__ import annotations

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.training.train import train
from stages import console


def main(config: Config, run: Run, *, restart: bool) -> None:
    """Train, and say how it goes."""
    train(config, run, restart=restart, listener=console.working)
