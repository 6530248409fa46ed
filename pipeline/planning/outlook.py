"""What an experiment will take, in figures and with what to set if a device is too small for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.models.locate import locate
from pipeline.planning.sampled import Sampled
from pipeline.planning.scoring import Scoring, sampling_memory, scoring_memory
from pipeline.planning.training import Held, simulate_step
from pipeline.precompute.plan import Plan
from pipeline.rollouts.write import on_policy
from pipeline.training.inputs.batches import tokens_in_a_pass
from pipeline.training.parallel.sharded import must_be_shardable
from pipeline.training.parallel.world import World
from pipeline.training.schedule import pairs_per_step, total_steps

# beside tensors, GiB: libraries, as measured on a CPU; CUDA's context and kernels, a guess until it is measured. And on top of
# tensors, as a share of them: buffers of oneDNN and blocks of a megabyte that are not given back, fitted to five measured peaks
# (`make bench-memory-train`)
_TRAINER_GIB = {"cpu": 0.65, "cuda": 0.8}
_ON_TOP = {"cpu": 0.08, "cuda": 0.0}
_ENGINE_GIB = {"cpu": 1.0, "cuda": 0.8}
# on how many a training is tried that is too large
DEVICES = (2, 4, 8, 16, 32, 64)


def of_process(tensors: int, kind: str) -> float:
    """GiB that a process holds on a device of `kind` whose tensors take so many bytes at their peak."""
    return tensors / 2**30 * (1 + _ON_TOP[kind]) + _TRAINER_GIB[kind]


@dataclass(frozen=True)
class Examples:
    """What a training reads: `tokens` of each example, `longest` of what one pass must take whole, `responses` tokens in all that
    predict one, and how many examples are trained on.
    """

    tokens: np.ndarray
    longest: int
    responses: int
    train: int


def examples_of(plan: Plan) -> Examples:
    """Pairs or groups, each read as a tree."""
    trees = plan.pairs.tree_tokens
    responses = int(plan.pairs.response_tokens.sum(dtype=np.int64))
    return Examples(trees, int(trees.max()), responses, plan.pairs.splits.get("train", 0))


def examples_of_samples(sampled: Sampled, train: TrainConfig, kind: str) -> Examples:
    """Prompts with their samples, all of them as long as they can be: a pass takes as many of a prompt's samples as fit, and reads
    the prompt once for these.
    """
    prompts, each = sampled.prompts, sampled.max_tokens - 1
    together = np.clip((tokens_in_a_pass(train, kind) - prompts) // max(1, each), 1, sampled.each)
    tokens = prompts * -(-sampled.each // together) + sampled.each * each
    return Examples(tokens, sampled.longest - 1, sampled.samples * sampled.max_tokens, len(prompts))


@dataclass(frozen=True)
class Outlook:
    """Predicted for each of `devices` of `kind` that train together: memory of training and of scoring, tokens and steps.

    `training` None: not predicted, for the reason `unpredicted`; `scoring` None: nothing is left to score, or can be; `sampling`
    None: nothing is left to sample.
    `accumulated`: a step is more than one forward pass, so that gradients stand beside all but the first.
    """

    kind: str
    devices: int
    training: Held | None
    unpredicted: str
    scoring: Scoring | None
    tokens_per_pass: int
    accumulated: bool
    steps: int
    training_tokens: int
    scoring_tokens: int
    longest: int
    scored_share: float
    examples: Examples
    sampling: Scoring | None

    @property
    def training_gib(self) -> float:
        """Peak of the training process's device; NaN if it is not predicted."""
        return of_process(self.training.total, self.kind) if self.training else math.nan

    @property
    def scoring_gib(self) -> float:
        """Peak of a scoring engine's device."""
        return (self.scoring.total / 2**30 if self.scoring else 0.0) + _ENGINE_GIB[self.kind]

    @property
    def sampling_gib(self) -> float:
        """Peak of the sampling engine's device; on a GPU at least."""
        return (self.sampling.total / 2**30 if self.sampling else 0.0) + _ENGINE_GIB[self.kind]


def on_a_gpu(config: Config) -> Config:
    """`config` with all that depends on the machine decided as on one with a GPU, whatever this one is."""
    train, reference = config.train, config.reference
    if train.precision == "auto":
        train = train.model_copy(update={"precision": "bfloat16"})
    if reference.device == "auto":
        reference = reference.model_copy(update={"device": "cuda"})
    return config.model_copy(update={"train": train, "reference": reference})


def outlook(
    config: Config, plan: Plan, kind: str | None = None, devices: int = 1, sampled: Sampled | None = None
) -> Outlook:
    """Predict what `config` takes on each of `devices` of `kind` (None: this machine's) that train together.

    `sampled`: what a training on samples has them of, in place of the plan's pairs.
    """
    kind = kind or device_kind()
    examples = examples_of_samples(sampled, config.train, kind) if sampled else examples_of(plan)
    size, share = pairs_per_step(config.train), min(1.0, float(examples.responses / examples.tokens.sum()))
    steps = total_steps(examples.train, config.train)
    tokens, accumulated = _of_a_pass(config, examples, kind, devices)
    base = locate(config.policy)
    scoring = None
    if sampled and sampled.to_score:
        numerics = sampled.policy.numerics
        base_of_policy = sampled.policy.paths.merged
        scoring = scoring_memory(config.reference, base_of_policy, numerics.dtype, sampled.longest, numerics.device)
    elif not sampled and len(plan.missing) and not plan.imported:
        numerics = plan.identity.numerics
        scoring = scoring_memory(
            config.reference, plan.reference.paths.merged, numerics.dtype, plan.longest_missing, numerics.device
        )
    training, unpredicted = None, ""
    try:
        training = simulate_step(config, base, tokens, int(tokens * share), kind, devices, accumulated=accumulated)
    except ConfigError as reason:
        unpredicted = str(reason)
    return Outlook(
        kind=kind,
        devices=devices,
        training=training,
        unpredicted=unpredicted,
        scoring=scoring,
        tokens_per_pass=tokens,
        accumulated=accumulated,
        steps=steps,
        training_tokens=int(examples.tokens.mean() * size * steps),
        scoring_tokens=sampled.tokens_to_score if sampled else 0 if plan.imported else plan.missing_tokens,
        longest=examples.longest,
        scored_share=share,
        examples=examples,
        sampling=_sampling(config, sampled) if sampled and sampled.missing else None,
    )


def _sampling(config: Config, sampled: Sampled) -> Scoring:
    settings = on_policy(config, sampled.policy.numerics.dtype)
    trusts_code = config.policy.trust_remote_code
    return sampling_memory(sampled.policy.paths.merged, settings.dtype, sampled.longest, trusts_code=trusts_code)


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
    """Settings, each added to those before it, and the GiB that training then takes; ends when that is `gib` or less.

    Leaves out what as many devices do not train.
    """
    content, settings = config.model_dump(), []
    for text, change in _SMALLER:
        if config.policy.lora is not None and "policy" in change:
            break
        if seen.devices > 1 and _refused(content, change, seen.devices):
            continue
        for section, fields in change.items():
            content[section] |= fields
        settings.append(text)
        needed = of_process(again(Config.model_validate(content), seen, seen.tokens_per_pass).total, seen.kind)
        yield " ".join(settings), needed
        if needed <= gib:
            return


def again(config: Config, seen: Outlook, tokens: int) -> Held:
    """What a step of `config` holds whose pass reads `tokens` tokens, all else as in `seen`."""
    return simulate_step(
        config,
        locate(config.policy),
        tokens,
        int(tokens * seen.scored_share),
        seen.kind,
        seen.devices,
        accumulated=seen.accumulated,
    )


def devices_that_fit(config: Config, seen: Outlook, gib: float) -> tuple[int, float] | None:
    """The fewest of DEVICES, more than now, on each of which training takes `gib` or less, and what it takes there; None if it
    takes more on all of them. Raises ConfigError for what many devices do not train.
    """
    more = [number for number in DEVICES if number > seen.devices]
    found, low, high = None, 0, len(more)
    # each takes less than the one before it, but for models so small that parts are mostly filling
    while low < high:
        middle = (low + high) // 2
        needed = _on(config, seen, more[middle])
        if needed <= gib:
            found, high = (more[middle], needed), middle
        else:
            low = middle + 1
    return found


def _on(config: Config, seen: Outlook, devices: int) -> float:
    tokens, accumulated = _of_a_pass(config, seen.examples, seen.kind, devices)
    there = replace(seen, devices=devices, accumulated=accumulated)
    return of_process(again(config, there, tokens).total, seen.kind)


def _refused(content: dict[str, Any], change: dict[str, dict[str, Any]], devices: int) -> bool:
    changed = {section: {**content[section], **fields} for section, fields in change.items()}
    try:
        must_be_shardable(Config.model_validate({**content, **changed}), World(0, devices))
    except ConfigError:
        return True
    return False


def _of_a_pass(config: Config, examples: Examples, kind: str, devices: int) -> tuple[int, bool]:
    """Tokens of a forward pass on each of `devices`, and whether a step is more than one."""
    # the pairs of a step are those of all devices
    share = examples.tokens.mean() * pairs_per_step(config.train) / devices
    most = max(examples.longest, tokens_in_a_pass(config.train, kind))
    return int(max(examples.longest, min(most, share))), bool(share > most)
