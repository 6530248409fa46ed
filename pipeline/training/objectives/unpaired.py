"""Losses of single responses that are labelled good or bad: pure functions of sequence log-probabilities, one loss per response.

Notation of the docstrings: rho = logp - ref_logp of a response, beta as configured, good and bad by the label.

Both losses compare a response with something that all responses of a step make together, a `baseline` in nats of rho times
beta: KTO with the divergence from the reference, BCO with the running mean of rewards. It is made first, by a function of
its own, and held fixed: no gradient passes it. Reductions to a step are means over its responses, good and bad.

Shapes: B responses. Inputs are float64 sums in nats; differences are taken there and continue in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from pipeline.training.objectives.measured import Measured, mean_over


class ResponseTerms(NamedTuple):
    """Loss and implicit reward beta * rho of each response, float32 [B], rewards detached; what they were compared with."""

    losses: torch.Tensor
    rewards: torch.Tensor
    baseline: torch.Tensor


# --- KTO


def kl_baseline(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """z0 = max(0, mean rho) of a step's mismatched responses, each the response to another prompt: nats, float64 scalar, detached.

    A biased estimate of KL(policy || reference) that needs no samples, as in KTO, section 4.1. `total`: the sum of their rho, of
    all forward passes and processes; the bound 0 is that of the mean, not of its terms.
    """
    return (total.double() / count).clamp(min=0).detach()


def kto_loss(
    policy_B: torch.Tensor,
    reference_B: torch.Tensor,
    good_B: torch.Tensor,
    z0: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> ResponseTerms:
    """The loss weight (1 - sigmoid(s beta (rho - z0))): s = 1 and desirable_weight if good, s = -1 and undesirable_weight if bad.

    KTO, Ethayarajh et al. 2024 (2402.01306), equation 7; `z0` as of `kl_baseline`, in nats. It has no optimum that balances: of a
    response that is called good with probability p, the expected loss only falls with its reward if p desirable_weight is
    above (1 - p) undesirable_weight, only rises if below. So the policy ends at what most call good (theorem 4.3), and what
    is far on either side moves no more (proposition 4.1).
    """
    rho = policy_B - reference_B
    sign = torch.where(good_B, 1.0, -1.0)
    weight = torch.where(good_B, desirable_weight, undesirable_weight)
    losses = weight * torch.sigmoid(-sign * (beta * (rho - z0)).float())
    return ResponseTerms(losses, (beta * rho.detach()).float(), (beta * z0).float())


# --- BCO


def bco_loss(
    policy_B: torch.Tensor,
    reference_B: torch.Tensor,
    good_B: torch.Tensor,
    delta: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> ResponseTerms:
    """The loss -weight log sigmoid(s (beta rho - delta)): s = 1 and desirable_weight if good, s = -1 and undesirable_weight if bad.

    BCO, Jung et al. 2024 (2404.04656): a classifier whose logit is the reward less its mean, and an upper bound of DPO's loss.
    `delta` is the mean reward of all responses that training has seen, this step's included; an evaluation adds none to it.

    With delta the mean reward of the data, the fixed point is DPO's optimum, pi_ref exp(r / beta) / Z with r the log-odds of
    good, if these log-odds are 0 on average. If they are not, it is another one, or none: weights whose ratio, desirable over
    undesirable, is exp(-mean log-odds), about the number of bad over that of good, give it back. Neither the paper nor TRL has
    such weights; the paper's weights for prompts that only one label has are not here.
    """
    rho = policy_B - reference_B
    sign = torch.where(good_B, 1.0, -1.0)
    weight = torch.where(good_B, desirable_weight, undesirable_weight)
    losses = -weight * logsigmoid(sign * (beta * rho - delta).float())
    return ResponseTerms(losses, (beta * rho.detach()).float(), delta.float())


# --- what is written down


def measured_responses(terms: ResponseTerms, policy_B: torch.Tensor, good_B: torch.Tensor) -> Measured:
    """TRAIN_METRICS of labelled responses: chosen are the good ones, rejected the bad ones.

    `rewards/accuracies` is the share of responses that lie on their label's side of the baseline. A step without bad ones has
    a count of 0 for theirs. `rewards/margins`, the difference of two such means, is no mean of parts and not among them.
    """
    good = good_B.double()
    return Measured(
        {
            "loss": mean_over(terms.losses),
            "rewards/chosen": mean_over(terms.rewards, good),
            "rewards/rejected": mean_over(terms.rewards, 1 - good),
            "rewards/accuracies": mean_over((terms.rewards > terms.baseline) == good_B),
            "logps/chosen": mean_over(policy_B, good),
            "logps/rejected": mean_over(policy_B, 1 - good),
        }
    )
