"""What an experiment will take, in figures and with what to set if a device is too small for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.experiment import Config
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.models.locate import locate
from pipeline.planning.scoring import Scoring, scoring_memory
from pipeline.planning.training import Held, simulate_step
from pipeline.precompute.plan import Plan
from pipeline.training.examples import tokens_in_a_pass
from pipeline.training.schedule import pairs_per_step, total_steps

# beside tensors, GiB: libraries, as measured on a CPU; CUDA's context and kernels, a guess until it is measured. And on top of
# tensors, as a share of them: buffers of oneDNN and blocks of a megabyte that are not given back, fitted to five measured peaks
# (`make bench-memory-train`)
_TRAINER_GIB = {"cpu": 0.65, "cuda": 0.8}
_ON_TOP = {"cpu": 0.08, "cuda": 0.0}
_ENGINE_GIB = {"cpu": 1.0, "cuda": 0.8}


def of_process(tensors: int, kind: str) -> float:
    """GiB that a process holds on a device of `kind` whose tensors take so many bytes at their peak."""
    return tensors / 2**30 * (1 + _ON_TOP[kind]) + _TRAINER_GIB[kind]


@dataclass(frozen=True)
class Outlook:
    """Predicted for a device of `kind`: memory of training and of scoring, tokens and steps.

    `training` None: not predicted, for the reason `unpredicted`; `scoring` None: nothing is left to score, or can be.
    """

    kind: str
    training: Held | None
    unpredicted: str
    scoring: Scoring | None
    tokens_per_pass: int
    steps: int
    training_tokens: int
    scoring_tokens: int
    longest: int
    scored_share: float

    @property
    def training_gib(self) -> float:
        """Peak of the training process's device; NaN if it is not predicted."""
        return of_process(self.training.total, self.kind) if self.training else math.nan

    @property
    def scoring_gib(self) -> float:
        """Peak of a scoring engine's device."""
        return (self.scoring.total / 2**30 if self.scoring else 0.0) + _ENGINE_GIB[self.kind]


def on_a_gpu(config: Config) -> Config:
    """`config` with all that depends on the machine decided as on one with a GPU, whatever this one is."""
    train, reference = config.train, config.reference
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bfloat16"})
    if reference.device == "auto":
        reference = reference.model_copy(update={"device": "cuda"})
    return config.model_copy(update={"train": train, "reference": reference})


def outlook(config: Config, plan: Plan, kind: str | None = None) -> Outlook:
    """Predict what `config` takes on a device of `kind` (None: this machine's)."""
    kind = kind or device_kind()
    prompts = plan.pairs.prompt_tokens.astype(np.int64)
    responses = plan.pairs.response_tokens.astype(np.int64).reshape(-1, 2)
    # the last token of a response predicts nothing and is not read
    trees = prompts + responses.sum(1) - 2
    size, share = pairs_per_step(config.train), float(responses.sum() / trees.sum())
    train_pairs = plan.pairs.splits.get("train", 0)
    steps = total_steps(train_pairs, config.train)
    tokens = int(max(trees.max(), min(tokens_in_a_pass(config.train, kind), trees.mean() * size)))
    base = locate(config.policy)
    scoring = None
    if len(plan.missing) and not plan.imported:
        numerics = plan.identity.numerics
        scoring = scoring_memory(
            config.reference, plan.reference.paths.merged, numerics.dtype, plan.longest_missing, numerics.device
        )
    training, unpredicted = None, ""
    try:
        training = simulate_step(config, base, tokens, int(tokens * share), kind)
    except ConfigError as reason:
        unpredicted = str(reason)
    return Outlook(
        kind=kind,
        training=training,
        unpredicted=unpredicted,
        scoring=scoring,
        tokens_per_pass=tokens,
        steps=steps,
        training_tokens=int(trees.mean() * size * steps),
        scoring_tokens=0 if plan.imported else plan.missing_tokens,
        longest=int(trees.max()),
        scored_share=share,
    )


# what makes a training smaller, in the order in which it is tried
_SMALLER: tuple[tuple[str, dict[str, dict[str, Any]]], ...] = (
    ("train.gradient_checkpointing=true", {"train": {"gradient_checkpointing": True}}),
    ("train.activation_offloading=true", {"train": {"activation_offloading": True}}),
    (
        "policy.dtype=bfloat16 train.precision=bfloat16 train.optimizer=adamw_8bit",
        {"policy": {"dtype": "bfloat16"}, "train": {"precision": "bfloat16", "optimizer": "adamw_8bit"}},
    ),
    (
        "train.optimizer_in_backward=true train.max_grad_norm=null",
        {"train": {"optimizer_in_backward": True, "max_grad_norm": None}},
    ),
)


def smaller(config: Config, seen: Outlook, gib: float) -> Iterator[tuple[str, float]]:
    """Settings, each added to those before it, and the GiB that training then takes; ends when that is `gib` or less."""
    base, content, settings = locate(config.policy), config.model_dump(), []
    for text, change in _SMALLER:
        if config.policy.lora is not None and "policy" in change:
            break
        for section, fields in change.items():
            content[section] |= fields
        settings.append(text)
        scored = int(seen.tokens_per_pass * seen.scored_share)
        held = simulate_step(Config.model_validate(content), base, seen.tokens_per_pass, scored, seen.kind)
        needed = of_process(held.total, seen.kind)
        yield " ".join(settings), needed
        if needed <= gib:
            return
