"""How sure a figure is. The unit is the prompt: several samples or orders of one prompt are not independent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.judges import Judgement

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """A judge's verdict over prompts. Ties count half; `failed` prompts are in no other figure.

    `flips` counts comparisons in which the judge contradicted itself when the order changed; they are ties.
    """

    prompts: int
    rate: Interval
    wins: int
    ties: int
    losses: int
    failed: int
    flips: int
    sign_test_p: float


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with a percentile bootstrap over the values: 95 %, 10,000 resamples. One value has no interval but itself."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise ValueError("the mean of no values")
    mean = float(array.mean())
    if len(array) == 1 or (array == array[0]).all():
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (array,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=1000
    )
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def win_rate(judgements: Iterable[Judgement]) -> WinRate | None:
    """The win rate of one judge's judgements; None where not a single comparison was judged."""
    by_comparison: dict[tuple[str, int], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_comparison[judgement.prompt_id, judgement.sample].append(judgement)
    by_prompt: dict[str, list[float]] = defaultdict(list)
    flips = 0
    failed_prompts = set()
    for (prompt_id, _), orders in by_comparison.items():
        scores = [one.score for one in orders if one.score is not None]
        if len(scores) < len(orders):
            failed_prompts.add(prompt_id)
            continue
        flipped = any(score > 0.5 for score in scores) and any(score < 0.5 for score in scores)
        flips += flipped
        by_prompt[prompt_id].append(0.5 if flipped else float(np.mean(scores)))
    failed = len(failed_prompts - by_prompt.keys())
    if not by_prompt:
        return None
    means = [float(np.mean(scores)) for scores in by_prompt.values()]
    wins, losses = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    # exact sign test: ties say nothing about a direction
    p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return WinRate(len(means), bootstrap_mean(means), wins, len(means) - wins - losses, losses, failed, flips, p)
