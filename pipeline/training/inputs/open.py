"""What an objective learns from, by the configuration: made to fit it before a training begins, then read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.artifacts.runs import Run
from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.errors import ConfigError
from pipeline.precompute.pairs_file import ensure_pairs
from pipeline.progress import Listener
from pipeline.rollouts.current import ensure_rollouts
from pipeline.training.inputs.pairs import Pairs, load_pairs
from pipeline.training.inputs.rollouts import Rollouts, load_rollouts


@dataclass(frozen=True)
class Inputs:
    """Examples to learn from, held-out ones, and a line that says what they are."""

    examples: Any
    held_out: Pairs
    words: str


def ensure_inputs(config: Config, run: Run, listener: Listener) -> dict[str, Any]:
    """Make the run's table fit the configuration; returns what it says of itself.

    Raises ConfigError if scores or samples are missing, or if the variant learns only from samples of the reference.
    """
    if config.train.objective != "policy_gradient":
        ensure_pairs(config, run, listener)
        return read_about(run.pairs)
    ensure_rollouts(config, run)
    about, settings = read_about(run.rollouts), config.train.policy_gradient
    if settings.facts.compares and about["policy_id"] != about["reference_id"]:
        raise ConfigError(
            f"variant {settings.variant} measures what rewards the reference's samples have, and those of {run.rollouts} were "
            "written by another model: make it the reference (generate.next_reference=previous in later rounds), or choose "
            "another train.policy_gradient.variant"
        )
    return about


def about_inputs(config: Config, run: Run) -> dict[str, Any]:
    """What the run's table says of itself."""
    return read_about(run.rollouts if config.train.objective == "policy_gradient" else run.pairs)


def load_inputs(config: Config, run: Run) -> Inputs:
    """Read what the training learns from. Raises DataError if it is damaged or teaches nothing."""
    train = config.train
    if train.objective == "policy_gradient":
        rollouts = load_rollouts(run.rollouts, train.policy_gradient)
        return Inputs(rollouts, Pairs([], [], [], []), _words(rollouts))
    scored = not reference_free(train)
    by_token = scored and train.ld_alpha is not None
    pairs, held_out = (load_pairs(run.pairs, split, scored=scored, by_token=by_token) for split in ("train", "eval"))
    return Inputs(pairs, held_out, f"pairs     {len(pairs)} train, {len(held_out)} eval")


def _words(rollouts: Rollouts) -> str:
    without = "".join(f"; {count} samples {reason} left out" for reason, count in rollouts.left_out.items())
    return f"samples   {len(rollouts.rewards)} of {len(rollouts)} prompts{without}"
