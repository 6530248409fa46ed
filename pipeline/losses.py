"""Preference losses: pure functions of sequence log-probabilities, in float32.

Shapes: B pairs. Inputs are sums of logps over a response, in nats. Rewards are detached: they are for reporting.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


class LossTerms(NamedTuple):
    """Loss and implicit rewards of each pair, float32 [B]."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossTerms:
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), equation 7, for every pair.

    loss = -(1-e) log sigmoid(beta z) - e log sigmoid(-beta z) with z the difference of the log-ratios. `label_smoothing`
    e > 0 is conservative DPO (Mitchell 2023): the share of labels taken to be flipped.
    """
    chosen_logratios = (policy_chosen - ref_chosen).float()
    rejected_logratios = (policy_rejected - ref_rejected).float()
    z = beta * (chosen_logratios - rejected_logratios)
    losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
    return LossTerms(losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach())
