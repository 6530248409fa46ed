"""How large a training may be on this machine: length, adapters and the tokens of a pass are chosen together, as the memory of a
step depends on all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.experiment import Config
from pipeline.errors import ConfigError
from pipeline.planning.outlook import of_process
from pipeline.planning.survey import Survey
from pipeline.planning.training import simulate_step
from pipeline.training.inputs.batches import tokens_in_a_pass

# of the device's memory; the rest is for evaluation, the allocator and other processes
_OF_MEMORY = 0.8


@dataclass
class Shape:
    """What the memory of a step depends on, which pairs are within the length, and what was predicted, in words."""

    length: int
    kept: np.ndarray
    batch: int
    tokens_per_batch: int
    lora: bool
    checkpointing: bool
    memory: str = ""
    fits: bool = True


def shaped(found: Survey, kind: str, memory: float) -> Shape:
    """The first shape, from the usual one to ever smaller ones, whose training fits; the smallest if none does."""
    shapes = _shapes(found, kind)
    for shape in shapes:
        try:
            needed = _needed(found, shape, kind)
        except ConfigError as reason:
            shapes[0].memory = str(reason)
            return shapes[0]
        shape.memory = f"training is predicted to take {needed:.1f} of {memory:.1f} GiB"
        shape.fits = needed <= _OF_MEMORY * memory
        if shape.fits:
            return shape
    return shapes[-1]


def _shapes(found: Survey, kind: str) -> list[Shape]:
    usual = _length(found)
    quantiles = (_rounded(float(np.quantile(found.lengths, share))) for share in (0.95, 0.9, 0.75, 0.5))
    shorter = [length for length in dict.fromkeys(quantiles) if length < usual]
    # a GPU recomputes activations by default
    recomputing = (False, True) if kind == "cpu" else (False,)
    ways = [(usual, lora, again) for lora in (False, True) for again in recomputing]
    ways += [(length, True, recomputing[-1]) for length in shorter]
    default = tokens_in_a_pass(Config.model_validate({"data": {"path": "x"}}).train, kind)
    shapes = []
    for length, lora, again in ways:
        kept = found.lengths <= length
        batch = _batch(int(kept.sum()))
        # a pass holds one whole pair at least, so fewer tokens help only if that is short
        smaller = [default // 4] if found.trees[kept].max() < default else []
        shapes += [Shape(length, kept, batch, tokens, lora, again) for tokens in (default, *smaller)]
    return shapes


def _needed(found: Survey, shape: Shape, kind: str) -> float:
    """GiB of a training step."""
    trees, responses = found.trees[shape.kept], found.responses[shape.kept]
    train: dict[str, Any] = {"tokens_per_batch": shape.tokens_per_batch}
    if shape.checkpointing:
        train["gradient_checkpointing"] = True
    policy = {"model": found.model, "lora": {"r": 16} if shape.lora else None}
    config = Config.model_validate({"data": {"path": "x"}, "policy": policy, "train": train})
    step = trees.mean() * shape.batch
    most = max(trees.max(), shape.tokens_per_batch)
    tokens = int(max(trees.max(), min(most, step)))
    scored = int(tokens * responses.sum() / trees.sum())
    held = simulate_step(config, found.base, tokens, scored, kind, accumulated=bool(step > most))
    return of_process(held.total, kind)


def _length(found: Survey) -> int:
    """The longest pair, or if it stands out what 99 % of the pairs do not exceed; never more than the model reads."""
    longest, nearly_all = int(found.lengths.max()), float(np.quantile(found.lengths, 0.99, method="higher"))
    usual = float(np.quantile(found.lengths, 0.9))
    wanted = _rounded(nearly_all if longest > 2 * usual else longest)
    return min(wanted, found.positions) if found.positions else wanted


def _rounded(length: float) -> int:
    return 64 * math.ceil(length / 64)


def _batch(pairs: int) -> int:
    # of few pairs large steps would be few
    return 8 if pairs < 500 else 16 if pairs < 2000 else 32
