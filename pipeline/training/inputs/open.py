"""What an objective learns from, by the configuration: made to fit it before a training begins, then read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.artifacts.runs import Run
from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config
from pipeline.config.losses import data_of, margins, mismatched, reference_free
from pipeline.errors import ConfigError
from pipeline.precompute.pairs_file import ensure_pairs, table_of
from pipeline.progress import Listener
from pipeline.rollouts.current import ensure_rollouts
from pipeline.training.inputs.pairs import Pairs, load_pairs
from pipeline.training.inputs.responses import Responses, RunningMean, load_responses
from pipeline.training.inputs.rollouts import Rollouts, load_rollouts


@dataclass(frozen=True)
class Inputs:
    """Examples to learn from, held-out ones, and a line that says what they are."""

    examples: Any
    held_out: Any
    words: str


def ensure_inputs(config: Config, run: Run, listener: Listener) -> dict[str, Any]:
    """Make the run's table fit the configuration; returns what it says of itself.

    Raises ConfigError if scores or samples are missing, or if the variant learns only from samples of the reference.
    """
    if not config.train.on_samples:
        ensure_pairs(config, run, listener)
        return read_about(table_of(run, config))
    ensure_rollouts(config, run)
    about, settings = read_about(run.rollouts), config.train.policy_gradient
    if config.train.objective == "value":
        return about
    if settings.facts.compares and about["policy_id"] != about["reference_id"]:
        raise ConfigError(
            f"variant {settings.variant} measures what rewards the reference's samples have, and those of {run.rollouts} were "
            "written by another model: make it the reference (generate.next_reference=previous in later rounds), or choose "
            "another train.policy_gradient.variant"
        )
    return about


def about_inputs(config: Config, run: Run) -> dict[str, Any]:
    """What the run's table says of itself."""
    return read_about(run.rollouts if config.train.on_samples else table_of(run, config))


def load_inputs(config: Config, run: Run) -> Inputs:
    """Read what the training learns from. Raises DataError if it is damaged or teaches nothing."""
    train = config.train
    if train.on_samples:
        rollouts = load_rollouts(run.rollouts, train.policy_gradient, for_critic=train.objective == "value")
        return Inputs(rollouts, Pairs([], [], [], []), _words(rollouts))
    scored = not reference_free(train)
    if data_of(train) != "pairs":
        running, others = RunningMean(), mismatched(train)
        learnt, held_out = (
            load_responses(run.responses, split, scored=scored, mismatched=others, running=running)
            for split in ("train", "eval")
        )
        unit = {"responses": "responses", "lists": "lists"}[data_of(train)]
        return Inputs(learnt, held_out, f"{unit:9} {len(learnt)} train, {len(held_out)} eval")
    by_token = scored and train.ld_alpha is not None
    readers = ", ".join(f"train.loss_type={name}" for name in margins(train))
    if train.objective == "reward" and train.margin_scale:
        readers = "train.margin_scale"
    pairs, held_out_pairs = (
        load_pairs(run.pairs, split, scored=scored, by_token=by_token, margins=readers) for split in ("train", "eval")
    )
    return Inputs(pairs, held_out_pairs, f"pairs     {len(pairs)} train, {len(held_out_pairs)} eval")


def state_of(examples: Any) -> dict[str, torch.Tensor]:
    """What examples keep of a training, as part of its checkpoints: the mean of rewards that BCO compares with."""
    if not isinstance(examples, Responses):
        return {}
    running = examples.running
    return {"rewards/seen": torch.tensor([running.total, running.count], dtype=torch.float64)}


def load_state(examples: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Go on from the state of a checkpoint."""
    if isinstance(examples, Responses) and "rewards/seen" in state:
        examples.running.total, examples.running.count = state["rewards/seen"].tolist()


def _words(rollouts: Rollouts) -> str:
    without = "".join(f"; {count} samples {reason} left out" for reason, count in rollouts.left_out.items())
    return f"samples   {len(rollouts.rewards)} of {len(rollouts)} prompts{without}"
