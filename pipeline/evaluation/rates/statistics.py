"""How sure a figure is: intervals, tests, and what a sample of this size could have shown. Plain numbers in, no judge.

The unit is the prompt: callers average several samples or orders of one prompt before they come here, because those are
not independent. Every interval is 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
# below this many prompts a percentile bootstrap is too narrow, and Wilson's interval takes its place
SMALL = 50
RARE = 5
_Z = float(stats.norm.ppf(0.975))
_POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; `n`: of how many values, mostly prompts, None if that is not known."""

    mean: float
    low: float
    high: float
    n: int | None = None

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean with a percentile bootstrap over the values: 10,000 resamples. One value has no interval but itself."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise ValueError("the mean of no values")
    mean = float(array.mean())
    if len(array) == 1 or (array == array[0]).all():
        return Interval(mean, mean, mean, len(array))
    bootstrap = stats.bootstrap(
        (array,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=1000
    )
    low, high = bootstrap.confidence_interval
    return Interval(mean, float(low), float(high), len(array))


def wilson(successes: float, number: int) -> Interval:
    """Wilson's score interval of a share; half successes (ties) are allowed and make it a little too wide."""
    if not 0 <= successes <= number or number == 0:
        raise ValueError(f"{successes} successes of {number}")
    share = successes / number
    centre = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    half = _Z / (1 + _Z**2 / number) * float(np.sqrt(share * (1 - share) / number + _Z**2 / (4 * number**2)))
    # in exact arithmetic the ends are 0 and 1 if nothing or everything succeeded
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), number)


def share(scores: Sequence[float]) -> tuple[Interval, str]:
    """Mean of scores in [0, 1] with its interval, and how that was made: "bootstrap" or "wilson".

    Wilson's if the prompts are few, or nearly all agree: a bootstrap of equal values has no width at all, which
    would claim certainty.
    """
    array = np.asarray(scores, dtype=np.float64)
    total = float(array.sum())
    if len(array) < SMALL or (array == array[0]).all() or min(total, len(array) - total) < RARE:
        return wilson(total, len(array)), "wilson"
    return bootstrap_mean(array.tolist()), "bootstrap"


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p of `wins` against `losses` under even chances; ties say nothing about a direction."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def detectable(scores: Sequence[float]) -> float | None:
    """The smallest distance of a mean from its null that so many scores show 4 times in 5; None for one score.

    (z_0.975 + z_0.8) times the standard error, the usual normal approximation.
    """
    if len(scores) < 2:
        return None
    return float((_Z + stats.norm.ppf(_POWER)) * np.std(scores, ddof=1) / np.sqrt(len(scores)))


def prompts_for(scores: Sequence[float], distance: float) -> int | None:
    """How many prompts like these it takes to show `distance` 4 times in 5; None if nothing varies."""
    now = detectable(scores)
    return None if not now else int(np.ceil(len(scores) * (now / distance) ** 2))
