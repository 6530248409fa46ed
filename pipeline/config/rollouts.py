"""Policy gradient on stored samples: what is sampled and rewarded, and by which loss a policy learns from it.

A variant of the loss is a row of facts here; the formulas stand in `pipeline.training.objectives.policy_gradient`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import Field, model_validator

from pipeline.config.sections import Section, changed

Variant = Literal[
    "clip", "ppo", "grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce_pp", "topr", "qrpo", "apa", "a2po"
]
Advantage = Literal["leave_one_out", "group", "centred", "batch", "gae"]
# how a step's samples are averaged: over its tokens, over its samples each by its own mean or sum of tokens, or by the sum over
# the length that a sample could have had
Aggregation = Literal["tokens", "sample_means", "sample_sums", "constant"]


@dataclass(frozen=True)
class VariantFacts:
    """What a variant is made of, as far as its paper says; settings of the configuration stand above it.

    `advantage`: None if it regresses on rewards instead. `level`: whether a ratio belongs to a token, to a sample (the product of
    its tokens') or to a sample's mean token. `clip`: lower and upper distance from 1; cispo's upper bound is that of the ratio.
    `kl`: where a KL to the reference goes if there is one. `compares`: with the reference, whatever the KL's coefficient.
    """

    paper: str
    advantage: Advantage | None
    aggregation: Aggregation
    level: Literal["token", "sample", "sample_mean"] = "token"
    clip: tuple[float, float] | None = (0.2, 0.2)
    kl: Literal["loss", "reward"] = "loss"
    compares: bool = False

    @property
    def of_tokens(self) -> bool:
        """Whether its loss is a sum over tokens that may have an advantage each."""
        return self.level == "token" and self.clip is not None


VARIANTS: dict[str, VariantFacts] = {
    "clip": VariantFacts("1707.06347, 2503.14476", "leave_one_out", "tokens", clip=(0.2, 0.28)),
    "ppo": VariantFacts("1707.06347, 1506.02438", "gae", "tokens", kl="reward"),
    "grpo": VariantFacts("2402.03300", "group", "sample_means"),
    "dr_grpo": VariantFacts("2503.20783", "centred", "constant"),
    "dapo": VariantFacts("2503.14476", "group", "tokens", clip=(0.2, 0.28)),
    "rloo": VariantFacts("2402.14740", "leave_one_out", "sample_sums", level="sample", kl="reward"),
    "gspo": VariantFacts("2507.18071", "group", "sample_means", level="sample_mean", clip=(3e-4, 4e-4)),
    "cispo": VariantFacts("2506.13585", "group", "tokens", clip=(1.0, 4.0)),
    "reinforce_pp": VariantFacts("2501.03262", "batch", "tokens", kl="reward"),
    "topr": VariantFacts("2503.14286", "centred", "sample_sums", level="sample", clip=None),
    "qrpo": VariantFacts("2507.08068", None, "sample_sums", clip=None, compares=True),
    "apa": VariantFacts("2306.02231", "leave_one_out", "sample_sums", clip=None),
    "a2po": VariantFacts("2505.20686", None, "sample_sums", clip=None, compares=True),
}


class RolloutConfig(Section):
    """Samples of training prompts with their rewards and scores, for train.objective=policy_gradient.

    They are drawn at temperature 1 from the whole distribution; `generate` says how long they are and in which dtype.
    """

    samples: int = Field(
        8, ge=1, description="responses for each training prompt; a single one teaches with a critic only"
    )
    prompts: int | None = Field(None, ge=1, description="at most so many training prompts")
    judge: str | None = Field(
        None,
        description="judge that gives the rewards, listed under `judge` or not; default: the first listed of texts",
    )
    seed: int = Field(0, ge=0)
    prompts_per_shard: int = Field(
        32, ge=1, description="prompts whose samples are published together: what a kill loses at most"
    )
    critic: str | None = Field(
        None,
        description="value model that train.objective=value made, run:<run> or its directory: its values of every token are "
        "stored too, for train.policy_gradient.advantage=gae",
    )


class PolicyGradientConfig(Section):
    """The loss of train.objective=policy_gradient; a field that is null is as the variant's paper has it."""

    variant: Variant = Field(
        "clip",
        description=f"{', '.join(get_args(Variant))}; formulas in pipeline/training/objectives/policy_gradient.py",
    )
    advantage: Advantage | None = Field(
        None,
        description="reward less the mean of the prompt's other samples (leave_one_out), or of all of them (centred), also by "
        "their standard deviation (group), or by that of the step (batch); of tokens, by rollout.critic's values (gae)",
    )
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="gae: 1: reward less value; 0: a step's reward and the next value, less the value"
    )
    gae_gamma: float = Field(1.0, gt=0, le=1, description="discount per token of gae, and of what a critic learns")
    critic_learning_rate: float = Field(
        1e-5, gt=0, description="gae: train.learning_rate of the critics that `refscore iterate` trains"
    )
    epsilon: float | None = Field(None, gt=0, le=1, description="ratios are clipped at 1 - epsilon")
    epsilon_high: float | None = Field(None, gt=0, description="and at 1 + epsilon_high")
    delta: float | None = Field(
        None, gt=1, description="ratios of samples with a negative advantage are clipped at delta too; null: not at all"
    )
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the reference")
    kl_in: Literal["loss", "reward"] | None = Field(
        None,
        description="where the KL goes: k3 per token in the loss, or the samples' log-ratio off their reward; by reward rounds "
        "lead to DPO's policy, by loss near it",
    )
    value_temperature: float = Field(
        0.5, gt=0, description="a2po: temperature of the soft maximum of a prompt's rewards"
    )
    mask_truncated_completions: bool = Field(
        False,
        description="samples that were cut off count for the baseline of the others, and teach nothing themselves",
    )
    max_kl: float | None = Field(
        0.1,
        gt=0,
        description="training ends when the policy is so far from the model that wrote the samples: k3 per token, mean of a step, "
        "nats; null: never",
    )

    @property
    def facts(self) -> VariantFacts:
        """The variant, with what this section says otherwise."""
        of_paper = VARIANTS[self.variant]
        clip = of_paper.clip
        if clip is not None:
            low = clip[0] if self.epsilon is None else self.epsilon
            clip = low, clip[1] if self.epsilon_high is None else self.epsilon_high
        return replace(
            of_paper, advantage=self.advantage or of_paper.advantage, clip=clip, kl=self.kl_in or of_paper.kl
        )

    @property
    def reads_reference(self) -> bool:
        """Whether anything in the loss compares with the reference."""
        return self.facts.compares or self.kl_coef > 0

    @property
    def reads_values(self) -> bool:
        """Whether advantages are of tokens, by a critic's values."""
        return self.facts.advantage == "gae"

    @property
    def kl_in_reward(self) -> float:
        """Weight of the samples' log-ratio to the reference that comes off their reward; 0: nothing does."""
        return self.kl_coef if self.facts.kl == "reward" else 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> PolicyGradientConfig:
        of_paper, given = VARIANTS[self.variant], changed(self)
        problems = []
        if of_paper.clip is None and (unread := given & {"epsilon", "epsilon_high", "delta"}):
            problems.append(f"variant {self.variant} clips no ratio and does not read {', '.join(sorted(unread))}")
        if self.variant == "cispo" and (unread := given & {"epsilon", "delta"}):
            problems.append(f"cispo bounds ratios by epsilon_high alone and does not read {', '.join(sorted(unread))}")
        if of_paper.advantage is None and self.advantage is not None:
            problems.append(f"variant {self.variant} regresses on rewards and has no advantage")
        if of_paper.advantage is None and (unread := given & {"kl_coef", "kl_in"}):
            problems.append(
                f"the loss of {self.variant} holds the reference by itself and does not read {', '.join(sorted(unread))}"
            )
        if "kl_in" in given and not self.kl_coef:
            problems.append("kl_in is read with a kl_coef alone")
        if of_paper.advantage is not None and self.reads_values and not of_paper.of_tokens:
            problems.append(f"advantage gae is of tokens, and variant {self.variant} weighs whole samples")
        if not self.reads_values and (unread := given & {"gae_lambda", "gae_gamma", "critic_learning_rate"}):
            problems.append(f"{', '.join(sorted(unread))}: read with advantage=gae only, which variant=ppo has")
        if "value_temperature" in given and self.variant != "a2po":
            problems.append("value_temperature is read by variant a2po only")
        if problems:
            raise ValueError("; ".join(problems))
        return self
