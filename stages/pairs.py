"""`refscore pairs`: the trained policy answers its training prompts, a judge scores the answers, best meets worst."""

from __future__ import annotations

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.next_round import write_new_pairs
from stages import console


def main(config: Config, run: Run) -> None:
    """Make new pairs from the run's policy, and say how many, and why not more."""
    new_pairs = write_new_pairs(config, run, console.working)
    for reason, count in new_pairs.left_out.items():
        console.say(f"left out  {count} x {reason}")
    console.say(f"pairs     {new_pairs.pairs} in {run.new_pairs}")
