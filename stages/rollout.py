"""`refscore rollout`: the policy answers its training prompts, a judge rewards the answers, both models score them."""

from __future__ import annotations

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.rollouts.write import write_rollouts
from stages import console


def main(config: Config, run: Run) -> None:
    """Make rollouts.parquet, and say what is in it."""
    made = write_rollouts(config, run, console.working)
    counts = made.counts
    console.say(
        f"rollouts  {counts.samples} samples of {counts.prompts - counts.without_samples} prompts: {run.rollouts}"
    )
