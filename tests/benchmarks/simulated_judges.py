"""Simulated judges and scores whose truth is known, for `make bench-statistics`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.judges.judging import Judgement

Draw = Callable[[np.random.Generator, int], np.ndarray]


def drawn(values: list[float], chances: list[float]) -> tuple[float, Draw]:
    """The mean of a distribution of few values, and a function that draws from it."""
    return float(np.dot(values, chances)), lambda rng, number: rng.choice(np.array(values), number, p=chances)


def nearly(rng: np.random.Generator, number: int) -> np.ndarray:
    return 0.9 * (rng.random(number) < 0.1) + rng.uniform(-0.015, 0.015, number)


RATES: dict[str, tuple[float, Draw]] = {
    "verdicts, 0.69 won, 0.16 tied": drawn([1, 0.5, 0], [0.69, 0.16, 0.15]),
    "0.97 won": drawn([1, 0], [0.97, 0.03]),
    "probabilities around 0.6": (0.6, lambda rng, number: rng.beta(6, 4, number)),
}
DIFFERENCES: dict[str, tuple[float, Draw]] = {
    "equal, 0.6 of prompts tied": drawn([0, 1, -1], [0.6, 0.2, 0.2]),
    "equal, 0.9 tied": drawn([0, 1, -1], [0.9, 0.05, 0.05]),
    "0.1 gained, none lost": drawn([0, 1], [0.9, 0.1]),
    "0.1 gained, probabilities": (0.09, nearly),
    "0.3 gained, 0.05 lost": drawn([0, 1, -1], [0.65, 0.3, 0.05]),
    "0.95 gained": drawn([1, 0], [0.95, 0.05]),
    "equal, probabilities": (0.0, lambda rng, number: rng.beta(4, 4, number) - rng.beta(4, 4, number)),
}


def leaning_judgements(rng: np.random.Generator, prompts: int, gain: float, leaning: float) -> list[Judgement]:
    """Judgements in both orders: log-odds of a prompt are normal around `gain`, each order adds noise and the leaning."""
    odds = gain + rng.normal(size=prompts)
    return [
        Judgement(str(n), 0, "j", "policy", "reference", order, "", float(score))
        for order, side in (("policy_first", 1), ("reference_first", -1))
        for n, score in enumerate(chance(odds + side * leaning + 0.5 * rng.normal(size=prompts)))
    ]


def length_judge(seed: int, bend: float, *, soft: bool) -> tuple[list[float], list[float]]:
    """Scores and length differences; log-odds are 0.5 and 2 tanh of `bend` standard deviations of length."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(1.0, 1.0, 300)
    odds = 0.5 + 2 * np.tanh(bend * differences / differences.std())
    chances = chance(odds + 0.3 * rng.normal(size=300) * soft)
    scores = chances if soft else (rng.random(300) < chances).astype(np.float64)
    return scores.tolist(), differences.tolist()


def seeds_of(rng: np.random.Generator, mean: float, seeds: int, spread: float) -> list[dict[str, float]]:
    """Scores of a method on 100 prompts from several seeds, whose own means vary by `spread`."""
    means = mean + spread * rng.normal(size=seeds)
    return [dict(zip(map(str, range(100)), (one + 0.2 * rng.normal(size=100)).tolist(), strict=True)) for one in means]


def chance(odds: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return np.asarray(1 / (1 + np.exp(-odds)))
