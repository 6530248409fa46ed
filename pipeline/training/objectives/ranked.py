"""Losses of responses whose order, or whose scores, are known: pure functions, one loss per list or per pair.

Notation of the docstrings: w chosen, l rejected, rho = logp - ref_logp, beta as configured, z = beta (rho_w - rho_l), m how much
better w was scored than l, eta the scale of m: what one unit of score is worth in nats of reward.

Shapes: B pairs, N responses of G lists one after the other, K the longest list. Inputs are float64; losses are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

# --- lists


def plackett_luce_loss(
    rho_N: torch.Tensor, scores_N: torch.Tensor, sizes: Sequence[int], *, beta: float
) -> torch.Tensor:
    """-sum_k log(exp(beta rho_k) / sum_{j: score_j <= score_k} exp(beta rho_j)): the negative log-probability of a list's order.

    DPO for rankings, Rafailov et al. 2023 (2305.18290), appendix A.3, equation 20. Lists of `sizes` responses lie one after the
    other; their order is that of `scores_N`, higher is better, and not their place. Equal scores share one denominator
    (Breslow 1974): a tie says of each that it could have been drawn where the tie begins, and pulls their rewards together.
    A list of two is DPO's sigmoid loss. A list of one has a loss of 0.
    """
    reward_GK = _lists(beta * rho_N, sizes, 0.0).float()
    score_GK = _lists(scores_N, sizes, torch.inf)
    # what fills a short list is above every response: in no denominator of theirs
    below_GKK = score_GK[:, None, :] <= score_GK[:, :, None]
    rest_GK = reward_GK[:, None, :].masked_fill(~below_GKK, -torch.inf).logsumexp(-1)
    return (rest_GK - reward_GK).masked_fill(score_GK == torch.inf, 0.0).sum(-1)


def best_and_worst(values_N: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Values of the first and the last response of every list, [2, G]; lists are in order, best first."""
    lists = torch.split(values_N, list(sizes))
    return torch.stack([torch.stack([values[0], values[-1]]) for values in lists], dim=1)


def _lists(values_N: torch.Tensor, sizes: Sequence[int], filling: float) -> torch.Tensor:
    return pad_sequence(list(torch.split(values_N, list(sizes))), batch_first=True, padding_value=filling)


# --- pairs with a margin


def rpo_sq_loss(
    rho_w: torch.Tensor, rho_l: torch.Tensor, margin_B: torch.Tensor, *, beta: float, eta: float
) -> torch.Tensor:
    """(z - eta m)^2: rewards shall differ as the scores do. Reward-aware preference optimization, Sun et al. 2025 (2502.00203),
    with the squared distance.
    """
    return ((beta * (rho_w - rho_l) - eta * margin_B) ** 2).float()


def rpo_bwd_kl_loss(
    rho_w: torch.Tensor, rho_l: torch.Tensor, margin_B: torch.Tensor, *, beta: float, eta: float
) -> torch.Tensor:
    """KL(q || p) of two coins, q = sigmoid(eta m), p = sigmoid(z): DPO whose labels are as sure as the scores say. Reward-aware
    preference optimization of Nemotron-4, Adler et al. 2024 (2406.11704); "backward" as Sun et al. 2025 (2502.00203) call it.
    """
    return _bernoulli_kl(eta * margin_B, beta * (rho_w - rho_l)).float()


def rpo_fwd_kl_loss(
    rho_w: torch.Tensor, rho_l: torch.Tensor, margin_B: torch.Tensor, *, beta: float, eta: float
) -> torch.Tensor:
    """KL(p || q) of two coins, p = sigmoid(z), q = sigmoid(eta m): `rpo_bwd_kl_loss` with its sides exchanged. Reward-aware
    preference optimization, Sun et al. 2025 (2502.00203), with the forward divergence.
    """
    return _bernoulli_kl(beta * (rho_w - rho_l), eta * margin_B).float()


def margin_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, margin_B: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r_w - r_l - m) of a reward model's scores: Llama 2, Touvron et al. 2023 (2307.09288), equation 2."""
    return -logsigmoid(chosen_B - rejected_B - margin_B.to(chosen_B.dtype))


def _bernoulli_kl(p_logit: torch.Tensor, q_logit: torch.Tensor) -> torch.Tensor:
    """KL(sigmoid(p) || sigmoid(q)) of two coins."""
    heads = torch.sigmoid(p_logit) * (logsigmoid(p_logit) - logsigmoid(q_logit))
    return heads + torch.sigmoid(-p_logit) * (logsigmoid(-p_logit) - logsigmoid(-q_logit))
