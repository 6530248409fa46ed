"""Preference losses: pure functions of sequence log-probabilities, one loss for each pair.

Notation of the docstrings: w chosen, l rejected, rho = logp - ref_logp (the log-ratio of policy and reference), s the score
of a response (its log-ratio, or an f-divergence's transform of it), |y| tokens of a response, e label_smoothing, beta as
configured. Reductions to a batch are means; only the AOT losses look at more than one pair.

Shapes: B pairs. Inputs are float64 sums in nats; differences are taken there and continue in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from pipeline.config.losses import LOSS_FACTS, reference_free
from pipeline.config.training import TrainConfig
from pipeline.training.objectives.ranked import margin_loss, rpo_bwd_kl_loss, rpo_fwd_kl_loss, rpo_sq_loss


class PairLogps(NamedTuple):
    """What is known of B pairs; rows 0 and 1 of a [2, B] tensor are chosen and rejected, float64.

    `policy_2B` and `reference_2B` are the sums that losses compare (with `ld_alpha` the tail of the longer response counts
    less), `sums_2B` plain sums of the policy's logps, `tokens_2B` lengths, `weights_B` WPO's weights, detached, or ones;
    `mean_chosen_tokens` is the mean over the pairs of the whole step. `margins_B`: how much better chosen was scored than rejected,
    float64, if a loss reads it.
    """

    policy_2B: torch.Tensor
    reference_2B: torch.Tensor
    sums_2B: torch.Tensor
    tokens_2B: torch.Tensor
    weights_B: torch.Tensor
    mean_chosen_tokens: float
    margins_B: torch.Tensor | None = None


class LossTerms(NamedTuple):
    """Loss and implicit rewards of each pair, float32 [B]; rewards are detached."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


class _Terms(NamedTuple):
    # float32 [B]: log-ratios, scores, and per-token means of the policy's logps
    rho_w: torch.Tensor
    rho_l: torch.Tensor
    s_w: torch.Tensor
    s_l: torch.Tensor
    mean_w: torch.Tensor
    mean_l: torch.Tensor


def preference_loss(x: PairLogps, train: TrainConfig) -> LossTerms:
    """The configured weighted sum of losses for every pair: losses and rewards, float32 [B], rewards detached.

    Rewards are beta * rho (nats times beta); of reference-free losses beta times what they compare: the sum of logps
    (CPO), or the mean (SimPO, ORPO).
    """
    rho = (x.policy_2B - x.reference_2B).float()
    score, mean = _f_divergence(rho, train), (x.sums_2B / x.tokens_2B).float()
    t = _Terms(rho[0], rho[1], score[0], score[1], mean[0], mean[1])
    weights = train.loss_weights or [1.0] * len(train.loss_type)
    total = torch.zeros_like(t.rho_w)
    for name, weight in zip(train.loss_type, weights, strict=True):
        total = total + weight * LOSSES[name](t, x, train) * x.weights_B.float()
    rewards = rho
    if reference_free(train):
        of_means = any(LOSS_FACTS[name].reward == "mean" for name in train.loss_type)
        rewards = mean if of_means else x.sums_2B.float()
    rewards = train.beta * rewards.detach()
    return LossTerms(total, rewards[0], rewards[1])


# --- the losses, by their names in the configuration


def _sigmoid(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """-(1-e) log sigmoid(beta (s_w - s_l)) - e log sigmoid(-beta (s_w - s_l)). DPO, Rafailov et al. 2023 (2305.18290),
    equation 7; with e > 0 conservative DPO (Mitchell 2023): e is the share of labels taken to be flipped.
    """
    return _smoothed(c.beta * (t.s_w - t.s_l), c.label_smoothing)


def _robust(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """[-(1-e) log sigmoid(z) + e log sigmoid(-z)] / (1 - 2e) with z = beta (s_w - s_l): unbiased where a share e of the
    labels is flipped. Robust DPO, Chowdhury et al. 2024 (2403.00409), equation 12.
    """
    z, e = c.beta * (t.s_w - t.s_l), c.label_smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def _hinge(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """max(0, 1 - beta (s_w - s_l)). SLiC, Zhao et al. 2023 (2305.10425), with DPO's reward, as in RSO, Liu et al. 2023
    (2309.06657).
    """
    return torch.relu(1 - c.beta * (t.s_w - t.s_l))


def _ipo(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """(s_w/|y_w| - s_l/|y_l| - 1/(2 beta))^2. IPO, Azar et al. 2023 (2310.12036), equation 17, with per-token means, as its
    authors ran it.
    """
    s_w, s_l = _per_token(t, x)
    return (s_w - s_l - 1 / (2 * c.beta)) ** 2


def _ipo_sum(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """(s_w - s_l - 1/(2 beta))^2. IPO, Azar et al. 2023 (2310.12036), equation 17 to the letter, on sums."""
    return (t.s_w - t.s_l - 1 / (2 * c.beta)) ** 2


def _exo_pair(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """KL(p || q) over {w, l} with p = softmax(beta s) and q = (1-e, e). EXO, Ji et al. 2024 (2402.00856), equation 16."""
    z, e = c.beta * (t.s_w - t.s_l), c.label_smoothing
    won = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return won + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def _nca_pair(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """-log sigmoid(beta rho_w) - 1/2 log sigmoid(-beta rho_w) - 1/2 log sigmoid(-beta rho_l). NCA, Chen et al. 2024
    (2402.05369), for K = 2.
    """
    r_w, r_l = c.beta * t.rho_w, c.beta * t.rho_l
    return -logsigmoid(r_w) - 0.5 * logsigmoid(-r_w) - 0.5 * logsigmoid(-r_l)


def _bco_pair(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """-log sigmoid(beta rho_w) - log sigmoid(-beta rho_l). BCO, Jung et al. 2024 (2404.04656), without its running mean of
    rewards.
    """
    return -logsigmoid(c.beta * t.rho_w) - logsigmoid(-c.beta * t.rho_l)


def _sppo_hard(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2. SPPO, Wu et al. 2024 (2405.00675), equation 4.7 with the winner's
    probability 1.
    """
    return (t.rho_w - 0.5 / c.beta) ** 2 + (t.rho_l + 0.5 / c.beta) ** 2


def _aot(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """The sigmoid loss of sorted(logp_w - logp_l) - sorted(ref_logp_w - ref_logp_l): one distribution shall dominate the
    other. AOT, Melnyk et al. 2024 (2406.05882), paired. Sorted over the step.
    """
    policy, reference = x.policy_2B[0] - x.policy_2B[1], x.reference_2B[0] - x.reference_2B[1]
    return _smoothed(c.beta * (policy.sort().values - reference.sort().values).float(), c.label_smoothing)


def _aot_unpaired(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """The sigmoid loss of sorted(rho_w) - sorted(rho_l). AOT, Melnyk et al. 2024 (2406.05882), unpaired; over the step."""
    return _smoothed(c.beta * (t.rho_w.sort().values - t.rho_l.sort().values), c.label_smoothing)


def _apo_zero(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """1 - sigmoid(beta rho_w) + sigmoid(beta rho_l): for chosen responses better than the policy's own. APO, D'Oosterlinck
    et al. 2024 (2408.06266), equation 7.
    """
    return 1 - torch.sigmoid(c.beta * t.rho_w) + torch.sigmoid(c.beta * t.rho_l)


def _apo_down(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """sigmoid(beta rho_w) + 1 - sigmoid(beta (rho_w - rho_l)): for chosen responses worse than the policy's own. APO,
    D'Oosterlinck et al. 2024 (2408.06266), equation 8.
    """
    return torch.sigmoid(c.beta * t.rho_w) + 1 - torch.sigmoid(c.beta * (t.rho_w - t.rho_l))


def _discopop(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """(1 - m) (-log sigmoid(z)) + m exp(-z) with z = beta (s_w - s_l), m = sigmoid(z / discopop_tau). DiscoPOP, Lu et al.
    2024 (2406.08414), equation 5.
    """
    z = c.beta * (t.s_w - t.s_l)
    mix = torch.sigmoid(z / c.discopop_tau)
    return -logsigmoid(z) * (1 - mix) + torch.exp(-z) * mix


def _sigmoid_norm(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """-log sigmoid(beta (s_w/|y_w| - s_l/|y_l|)): DPO with length-normalised scores, as in Tülu 3, Lambert et al. 2024
    (2411.15124), equation 6.
    """
    s_w, s_l = _per_token(t, x)
    return -logsigmoid(c.beta * (s_w - s_l))


def _sft(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """Cross-entropy of the chosen responses, so that its mean over the step's pairs is the mean over the step's tokens.
    RPO, Pang et al. 2024 (2404.19733), adds it to DPO.
    """
    return -(x.sums_2B[0] / x.mean_chosen_tokens).float()


def _simpo(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """The sigmoid loss of beta (mean logp_w - mean logp_l) - simpo_gamma. SimPO, Meng et al. 2024 (2405.14734), equation 6.
    Reference-free.
    """
    return _smoothed(c.beta * (t.mean_w - t.mean_l) - c.simpo_gamma, c.label_smoothing)


def _cpo(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """The sigmoid loss of beta (logp_w - logp_l) plus cpo_alpha times the cross-entropy of the chosen responses. CPO, Xu et
    al. 2024 (2401.08417), equation 5. Reference-free.
    """
    z = (x.sums_2B[0] - x.sums_2B[1]).float()
    return _smoothed(c.beta * z, c.label_smoothing) + c.cpo_alpha * _sft(t, x, c)


def _orpo(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """Cross-entropy of the chosen responses minus beta log sigmoid(log odds_w - log odds_l), odds of p = exp(mean logp).
    ORPO, Hong et al. 2024 (2403.07691), equations 6 and 7, whose lambda is beta here. Reference-free.
    """
    # a response that is certain has infinite odds
    means = (mean.clamp(max=-1e-6) for mean in (t.mean_w, t.mean_l))
    odds = [mean - torch.log(-torch.expm1(mean)) for mean in means]
    return _sft(t, x, c) - c.beta * logsigmoid(odds[0] - odds[1])


def _rpo_sq(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """(z - rpo_eta m)^2 with z = beta (rho_w - rho_l) and m the pair's stored margin: rewards shall differ as the scores do.
    Reward-aware preference optimization, Sun et al. 2025 (2502.00203), with the squared distance.
    """
    return rpo_sq_loss(t.rho_w, t.rho_l, _margins(x), beta=c.beta, eta=c.rpo_eta)


def _rpo_bwd_kl(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """KL(q || p) of two coins, q = sigmoid(rpo_eta m) with m the pair's stored margin, p = sigmoid(z): DPO whose labels are as sure
    as the scores say. Reward-aware preference optimization of Nemotron-4, Adler et al. 2024 (2406.11704).
    """
    return rpo_bwd_kl_loss(t.rho_w, t.rho_l, _margins(x), beta=c.beta, eta=c.rpo_eta)


def _rpo_fwd_kl(t: _Terms, x: PairLogps, c: TrainConfig) -> torch.Tensor:
    """KL(p || q) of the coins of rpo_bwd_kl, its sides exchanged. Sun et al. 2025 (2502.00203), the forward divergence."""
    return rpo_fwd_kl_loss(t.rho_w, t.rho_l, _margins(x), beta=c.beta, eta=c.rpo_eta)


LOSSES: dict[str, Callable[[_Terms, PairLogps, TrainConfig], torch.Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "ipo_sum": _ipo_sum,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "sft": _sft,
    "simpo": _simpo,
    "cpo": _cpo,
    "orpo": _orpo,
    "rpo_sq": _rpo_sq,
    "rpo_bwd_kl": _rpo_bwd_kl,
    "rpo_fwd_kl": _rpo_fwd_kl,
}


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | None = None) -> LossTerms:
    """-log sigmoid(r_w - r_l) of a reward model's scores [B]: Bradley and Terry 1952, as in Ouyang et al. 2022 (2203.02155); with
    `margins` -log sigmoid(r_w - r_l - margin).
    """
    losses = -logsigmoid(chosen - rejected) if margins is None else margin_loss(chosen, rejected, margins)
    return LossTerms(losses, chosen.detach(), rejected.detach())


# --- what responses are compared by


def weighted_sums(pair: Sequence[torch.Tensor], ld_alpha: float | None) -> torch.Tensor:
    """Sums (float64 [2]) of a pair's per-token logps, chosen and rejected; `ld_alpha` weighs tokens beyond the shorter one.

    LD-DPO, Liu et al. 2024 (2409.06411), equation 9: less of the margin comes from length alone.
    """
    if ld_alpha is None:
        return torch.stack([logps.double().sum() for logps in pair])
    shared = min(map(len, pair))
    return torch.stack([logps[:shared].double().sum() + ld_alpha * logps[shared:].double().sum() for logps in pair])


def wpo_weight(logps: torch.Tensor, log_sum_squares: torch.Tensor) -> torch.Tensor:
    """exp(mean over tokens of log p(y_t) - log sum_v p(v)^2): how much a response looks like the policy's own.

    WPO, Zhou et al. 2024 (2406.11827), equation 2 with sampled alignment. A pair's weight is the product of its two.
    """
    return torch.exp((logps.double() - log_sum_squares.double()).mean())


def _f_divergence(rho: torch.Tensor, c: TrainConfig) -> torch.Tensor:
    """f'(t) of t = exp(rho), up to a constant: f-DPO, Wang et al. 2023 (2309.16240), table 1."""
    if c.f_divergence_type == "forward_kl":
        return 1 - torch.exp(-rho)
    if c.f_divergence_type == "js_divergence":
        return math.log(2) + logsigmoid(rho)
    power = c.f_alpha_divergence_coef - 1
    if c.f_divergence_type == "alpha_divergence" and abs(power) > 1e-6:
        # exp(80) is the last that float32 can hold with room to spare
        return (torch.exp((power * rho).clamp(max=80.0)) - 1) / power
    return rho


def _margins(x: PairLogps) -> torch.Tensor:
    if x.margins_B is None:
        raise ValueError("the rpo losses read margins_B, how much better each chosen response was scored")
    return x.margins_B


def _smoothed(z: torch.Tensor, e: float) -> torch.Tensor:
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _per_token(t: _Terms, x: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    return t.s_w / x.tokens_2B[0].float(), t.s_l / x.tokens_2B[1].float()
