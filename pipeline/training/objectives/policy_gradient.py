"""Policy gradient on stored samples: the losses of `train.policy_gradient.variant`, and the objective made of them.

Notation of the docstrings: pi the policy, mu the model that wrote the samples, ref the reference, y a sample of |y| tokens, A its
advantage, r_t = pi(y_t) / mu(y_t) the ratio at a token. Losses are minimised. mu's and ref's log-probabilities are stored; they
come from the same scorer, so that before the first step every ratio is 1 and no correction between engines is needed.

Shapes: S samples of a pass, N tokens of all of them, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config.rollouts import PolicyGradientConfig, VariantFacts
from pipeline.config.training import TrainConfig
from pipeline.forward.logps import Forward
from pipeline.forward.transfer import to_device
from pipeline.training.inputs.rollouts import Rollouts, Samples
from pipeline.training.objectives.advantages import targets_of, token_advantages
from pipeline.training.objectives.common import CausalPolicy, OfSamples
from pipeline.training.objectives.measured import Found, Measured, mean_over


class SampleLogps(NamedTuple):
    """What is known of S samples of N tokens: float32 [N] log-probabilities of tokens in nats, for each the number of its sample
    (`sample_N`), and float64 [S] lengths, targets (an advantage, or what a sample's log-ratio is to be) and weights (0: teaches
    nothing). `reference_N` is None if nothing reads it. `targets_N`: advantages of tokens, float64, which `targets_S` are then the
    means of.
    """

    policy_N: torch.Tensor
    behaviour_N: torch.Tensor
    reference_N: torch.Tensor | None
    sample_N: torch.Tensor
    tokens_S: torch.Tensor
    targets_S: torch.Tensor
    weights_S: torch.Tensor
    targets_N: torch.Tensor | None = None

    @property
    def advantages(self) -> torch.Tensor:
        """[N] The advantage of every token, float32: its own, or that of its sample."""
        return (self.targets_S[self.sample_N] if self.targets_N is None else self.targets_N).float()

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """Each sample's sum of values of its tokens, [S]."""
        sums = torch.zeros(len(self.tokens_S), dtype=values_N.dtype, device=values_N.device)
        return sums.index_add(0, self.sample_N, values_N)


class Normalisers(NamedTuple):
    """What a step's sums are divided by: tokens of samples that count, samples, and tokens that a sample could have had."""

    tokens: float
    samples: float
    max_tokens: float


@dataclass(frozen=True)
class Step:
    """What is known of a step before any forward pass, by the numbers of its samples; a target is a number, or one per token."""

    targets: Mapping[int, float | np.ndarray]
    weights: Mapping[int, float]
    rewards: Mapping[int, float]
    reward_std: float
    normalisers: Normalisers


class PolicyGradient(OfSamples, CausalPolicy):
    """See `pipeline.training.objectives.objective.Objective`."""

    in_words = "by policy gradient"

    def whole(self, examples: Rollouts, rows: Sequence[int], train: TrainConfig) -> Step:
        """See `Objective.whole`."""
        settings, step = train.policy_gradient, examples.weighed(rows, train.policy_gradient)
        targets: Sequence[float | np.ndarray]
        if settings.reads_values:
            targets = token_advantages(examples, step.numbers, step.weights, settings)
        else:
            targets = np.concatenate(targets_of(examples, sorted(set(rows)), settings, train.beta)).tolist()
        spreads = [own.std(ddof=1) for row in rows if len(own := examples.rewards[examples.of(row)]) > 1]
        return Step(
            targets=dict(zip(step.numbers, targets, strict=True)),
            weights=dict(zip(step.numbers, step.weights.tolist(), strict=True)),
            rewards=dict(zip(step.numbers, examples.rewards[step.numbers].tolist(), strict=True)),
            reward_std=float(np.mean(spreads)) if spreads else math.nan,
            normalisers=Normalisers(step.tokens, float(step.samples), float(examples.max_tokens)),
        )

    def measured(
        self, forward: Forward, examples: Samples, group: Sequence[int], train: TrainConfig, whole: Step
    ) -> Found:
        """See `Objective.measured`."""
        settings = train.policy_gradient
        x = sample_logps(forward, examples, group, whole, reads_reference=settings.reads_reference)
        found = policy_gradient_loss(x, settings, train.beta, whole.normalisers)
        # the mean over the step's samples is the loss, whatever it is normalised by
        losses = found.losses_S * whole.normalisers.samples
        rewards = _tensor([whole.rewards[number] for number in group], losses)
        means = {
            "loss": mean_over(losses),
            "reward": mean_over(rewards),
            "reward_std": mean_over(torch.full_like(rewards, whole.reward_std)),
            **found.means,
        }
        return Found(losses, Measured(means, {"ratio/max": found.highest}))


def sample_logps(
    forward: Forward, examples: Samples, group: Sequence[int], whole: Step, *, reads_reference: bool
) -> SampleLogps:
    """The policy's log-probabilities of some samples, beside what is stored; with gradients if they are on."""
    branches = [tree[0] for tree in forward([examples.trees[number] for number in group])]
    device = branches[0].device
    lengths = np.array([len(logps) for logps in branches])

    def stored(column: str) -> torch.Tensor:
        return to_device(np.concatenate([examples.logps(number, column) for number in group]), device)

    targets = [whole.targets[number] for number in group]
    by_token = [target for target in targets if isinstance(target, np.ndarray)]
    return SampleLogps(
        torch.cat(branches).float(),
        stored("logps"),
        stored("ref_logps") if reads_reference else None,
        to_device(np.repeat(np.arange(len(lengths)), lengths), device),
        to_device(lengths.astype(np.float64), device),
        _tensor([float(np.mean(target)) for target in targets], branches[0]),
        _tensor([whole.weights[number] for number in group], branches[0]),
        to_device(np.concatenate(by_token), device) if by_token else None,
    )


class SampleLosses(NamedTuple):
    """Losses of S samples, float64, whose sum over a step is its loss; what was measured, by METRICS' names; the highest ratio."""

    losses_S: torch.Tensor
    means: dict[str, tuple[torch.Tensor, torch.Tensor]]
    highest: torch.Tensor


def policy_gradient_loss(
    x: SampleLogps, settings: PolicyGradientConfig, beta: float, normalisers: Normalisers
) -> SampleLosses:
    """The loss of every sample under the configured variant, and the metrics of its tokens.

    `beta`: the temperature of the variants that regress on rewards. A sample of weight 0 has no loss, and no tokens to divide by.
    """
    facts = settings.facts
    # what does not count may have run away, and no number of times infinity is nothing
    x = x._replace(policy_N=torch.where(x.weights_S[x.sample_N] > 0, x.policy_N, x.behaviour_N))
    log_ratio_N = x.policy_N - x.behaviour_N
    gap_N = None if x.reference_N is None else x.policy_N - x.reference_N
    clipped = None
    if settings.variant in ("qrpo", "a2po", "apa"):
        losses = _regressed(x, gap_N if facts.compares else None, log_ratio_N, beta) * x.weights_S / normalisers.samples
    elif settings.variant == "topr":
        losses = _topr(x, log_ratio_N) * x.weights_S / normalisers.samples
    else:
        losses, clipped = _clipped(x, log_ratio_N, settings, facts, normalisers)
    if gap_N is not None and settings.kl_coef and facts.kl == "loss":
        losses = losses + settings.kl_coef * _averaged(x, k3(-gap_N), facts, normalisers)
    return SampleLosses(losses, _metrics(x, log_ratio_N, gap_N, clipped), _highest(x, log_ratio_N))


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1, which has the mean KL(p || q) over tokens drawn from p if d = log q - log p, and is never negative.

    Schulman 2020, "Approximating KL divergence", the third estimator.
    """
    return torch.expm1(log_ratio) - log_ratio


# --- the losses of the variants


def _clipped(
    x: SampleLogps, log_ratio_N: torch.Tensor, settings: PolicyGradientConfig, facts: VariantFacts, by: Normalisers
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """-min(r A, clip(r, 1 - e_low, 1 + e_high) A): PPO, Schulman et al. 2017 (1707.06347), equation 7, with the upper bound of its
    own of DAPO, Yu et al. 2025 (2503.14476). r is a token's ratio; RLOO's (Ahmadian et al. 2024, 2402.14740) is the product of a
    sample's; GSPO's (Zheng et al. 2025, 2507.18071) exp of the mean of its log-ratios. `delta` bounds r if A < 0 (INTELLECT-2,
    2505.07291). CISPO (MiniMax-M1, 2506.13585) is -sg(min(r, 1 + e_high)) A log pi.

    Returns losses [S], and which of the tokens, or samples, were clipped from below and from above.
    """
    low, high = facts.clip or (math.inf, math.inf)
    if facts.level == "token":
        log_ratio, advantages = log_ratio_N, x.advantages
    else:
        sums = x.sums(log_ratio_N.double())
        log_ratio, advantages = (sums / x.tokens_S if facts.level == "sample_mean" else sums), x.targets_S
    ratio = log_ratio.exp()
    if settings.variant == "cispo":
        losses = -ratio.clamp(max=1 + high).detach() * advantages * x.policy_N
        clipped = torch.zeros_like(ratio, dtype=torch.bool), (ratio > 1 + high) & (advantages > 0)
    else:
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        losses = -torch.min(bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        clipped = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    if facts.level == "token":
        return _averaged(x, losses, facts, by), clipped
    # one ratio and one loss for the whole sample
    return losses * x.weights_S / by.samples, clipped


def _regressed(x: SampleLogps, gap_N: torch.Tensor | None, log_ratio_N: torch.Tensor, beta: float) -> torch.Tensor:
    """(beta log(pi(y) / ref(y)) - target)^2: QRPO, Matrenok et al. 2025 (2507.08068), with quantiles of rewards as targets, and
    A*-PO, Brantley et al. 2025 (2505.20686), with rewards less a prompt's optimal value. (log(pi(y) / mu(y)) - A / beta)^2: APA,
    Zhu et al. 2023 (2306.02231), of whole samples.
    """
    if gap_N is None:
        return (x.sums(log_ratio_N.double()) - x.targets_S) ** 2
    return (beta * x.sums(gap_N.double()) - x.targets_S) ** 2


def _topr(x: SampleLogps, log_ratio_N: torch.Tensor) -> torch.Tensor:
    """-A log pi(y) if A >= 0, else -sg(clip(pi(y) / mu(y), 0, 1)) A log pi(y): good samples at full weight however unlikely they
    have become, bad ones only as far as the policy still writes them. TOPR, Le Roux et al. 2025 (2503.14286).
    """
    ratios = x.sums(log_ratio_N.detach().double()).exp().clamp(max=1.0)
    weights = torch.where(x.targets_S >= 0, 1.0, ratios)
    return -weights * x.targets_S * x.sums(x.policy_N.double())


def _averaged(x: SampleLogps, values_N: torch.Tensor, facts: VariantFacts, by: Normalisers) -> torch.Tensor:
    """Values of tokens as parts [S] of a step's average; a sample of weight 0 has none."""
    sums = x.sums(values_N.double()) * x.weights_S
    if facts.aggregation == "tokens":
        return sums / by.tokens
    if facts.aggregation == "sample_means":
        return sums / x.tokens_S / by.samples
    if facts.aggregation == "constant":
        return sums / (by.samples * by.max_tokens)
    return sums / by.samples


# --- what is written down


def _metrics(
    x: SampleLogps,
    log_ratio_N: torch.Tensor,
    gap_N: torch.Tensor | None,
    clipped: tuple[torch.Tensor, torch.Tensor] | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    weights_N = x.weights_S[x.sample_N]
    means = {
        "ratio/mean": mean_over(log_ratio_N.exp(), weights_N),
        "kl/behaviour": mean_over(k3(log_ratio_N), weights_N),
    }
    if gap_N is not None:
        means["kl"] = mean_over(k3(-gap_N), weights_N)
    if clipped is not None:
        weights = weights_N if len(clipped[0]) == len(weights_N) else x.weights_S
        low, high = (side.double() for side in clipped)
        means |= {
            "clip_ratio/low_mean": mean_over(low, weights),
            "clip_ratio/high_mean": mean_over(high, weights),
            "clip_ratio/region_mean": mean_over(low + high, weights),
        }
    return means


def _highest(x: SampleLogps, log_ratio_N: torch.Tensor) -> torch.Tensor:
    counted = torch.where(x.weights_S[x.sample_N] > 0, log_ratio_N.detach().double(), -math.inf)
    return counted.max().exp()


def _tensor(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(np.array(values, dtype=np.float64), like.device)
