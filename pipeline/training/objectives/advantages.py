"""What stored samples are to teach: how much better each is than expected, or what a regression takes its log-ratio to.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.training.inputs.rollouts import Rollouts

# as TRL has it: what keeps a standard deviation of nothing from dividing by nothing
_EPSILON = 1e-4


def targets_of(
    examples: Rollouts, rows: Sequence[int], settings: PolicyGradientConfig, beta: float
) -> list[np.ndarray]:
    """For each prompt of a step the targets of its samples: advantages, or what the variant regresses log-ratios on."""
    rewards = [examples.rewards[examples.of(row)] for row in rows]
    if settings.variant == "qrpo":
        return [quantile_targets(own, beta) for own in rewards]
    if settings.variant == "a2po":
        return [own - soft_maximum(own, settings.value_temperature) for own in rewards]
    facts = settings.facts
    if settings.kl_in_reward:
        behaviour_S, reference_S = examples.sums_2S
        gaps = [(behaviour_S - reference_S)[examples.of(row)] for row in rows]
        rewards = [own - settings.kl_in_reward * gap for own, gap in zip(rewards, gaps, strict=True)]
    found = advantages(rewards, str(facts.advantage))
    return [own / beta for own in found] if settings.variant == "apa" else found


def advantages(groups: Sequence[np.ndarray], kind: str) -> list[np.ndarray]:
    """How much better each reward is than expected; `groups` are the rewards of each prompt's samples in a step.

    leave_one_out: less the mean of the others of the prompt (RLOO, Ahmadian et al. 2024, 2402.14740). centred: less the mean of
    all (Dr. GRPO, Liu et al. 2025, 2503.20783). group: also by their standard deviation (GRPO, Shao et al. 2024, 2402.03300).
    batch: less the mean of the step, by its standard deviation (REINFORCE++, Hu et al. 2025, 2501.03262).
    """
    if kind == "batch":
        every = np.concatenate(groups)
        deviation = float(every.std(ddof=1)) if len(every) > 1 else 0.0
        return [(own - every.mean()) / (deviation + _EPSILON) for own in groups]
    if kind == "leave_one_out":
        return [own - (own.sum() - own) / (len(own) - 1) for own in groups]
    centred = [own - own.mean() for own in groups]
    if kind == "centred":
        return centred
    return [own / (rewards.std(ddof=1) + _EPSILON) for own, rewards in zip(centred, groups, strict=True)]


def quantile_targets(rewards: np.ndarray, beta: float) -> np.ndarray:
    """R - beta log Z, R the reward's quantile among the prompt's samples, the share that is not better: under the reference exp(R /
    beta) has the mean Z = beta (exp(1 / beta) - 1). QRPO, Matrenok et al. 2025 (2507.08068).
    """
    quantiles: np.ndarray = (rewards[None, :] <= rewards[:, None]).mean(axis=1)
    # beta log(beta (e^(1/beta) - 1)) without its overflow
    return quantiles - (1 + beta * math.log(beta) + beta * math.log1p(-math.exp(-1 / beta)))


def soft_maximum(rewards: np.ndarray, temperature: float) -> float:
    """The temperature times log mean exp(r / temperature): a prompt's optimal value under KL regularisation, from samples of the
    reference. A*-PO, Brantley et al. 2025 (2505.20686).
    """
    highest = float(rewards.max())
    return highest + temperature * math.log(float(np.exp((rewards - highest) / temperature).mean()))


# --- advantages of tokens


def token_advantages(
    examples: Rollouts, numbers: Sequence[int], counts: np.ndarray, settings: PolicyGradientConfig
) -> list[np.ndarray]:
    """Generalised advantages of the tokens of a step's samples, float64 [T] each, by their stored values.

    Over the tokens of the samples that count (`counts` is not 0) they have mean 0 and standard deviation 1, as implementations of
    PPO have it: Huang et al. 2024 (2403.17031).
    """
    samples = examples.one_by_one
    found = [
        generalised_advantages(
            rewards, samples.logps(number, "values").astype(np.float64), settings.gae_gamma, settings.gae_lambda
        )
        for number, rewards in zip(numbers, token_rewards(examples, numbers, settings), strict=True)
    ]
    every = np.concatenate([own for own, count in zip(found, counts, strict=True) if count] or [np.zeros(1)])
    variance = float(every.var(ddof=1)) if len(every) > 1 else 0.0
    return [(own - every.mean()) / math.sqrt(variance + 1e-8) for own in found]


def token_returns(examples: Rollouts, numbers: Sequence[int], settings: PolicyGradientConfig) -> list[np.ndarray]:
    """What a critic learns: from every token of the samples on the discounted sum of rewards, float64 [T] each."""
    rewards = token_rewards(examples, numbers, settings)
    return [generalised_advantages(own, np.zeros(len(own)), settings.gae_gamma, 1.0) for own in rewards]


def token_rewards(examples: Rollouts, numbers: Sequence[int], settings: PolicyGradientConfig) -> list[np.ndarray]:
    """The rewards of every token, float64 [T] each: a sample's at its last one, and of each token its log-ratio to the reference
    off it if the KL is in the reward (Ouyang et al. 2022, 2203.02155, equation 2).
    """
    samples = examples.one_by_one
    found = []
    for number in numbers:
        logps = samples.logps(number, "logps").astype(np.float64)
        rewards = np.zeros(len(logps))
        if settings.kl_in_reward:
            rewards -= settings.kl_in_reward * (logps - samples.logps(number, "ref_logps"))
        rewards[-1] += examples.rewards[number]
        found.append(rewards)
    return found


def generalised_advantages(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = delta_t + gamma lam A_t+1 with delta_t = r_t + gamma V_t+1 - V_t, float64 [T]; after the last token both are 0.

    Schulman et al. 2016 (1506.02438), equation 16. Without values and with lam 1 it is the discounted sum of what is to come.
    """
    after = np.append(values[1:], 0.0)
    advantages: np.ndarray = rewards + gamma * after - values
    for token in range(len(advantages) - 2, -1, -1):
        advantages[token] += gamma * lam * advantages[token + 1]
    return advantages
