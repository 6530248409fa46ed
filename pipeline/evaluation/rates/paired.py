"""Two policies on the same prompts: a test and an interval of the mean difference that never contradict each other.

The test flips the signs of the prompts' differences: if the policies are equal, each sign was as likely as the other (Fisher
1935). The interval holds every mean that this test does not reject, which Hartigan (1969, "Using subsample values as typical
values") showed to be quantiles of the means of random subsets. Of few prompts that differ neither knows enough, see `paired`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.evaluation.rates.statistics import Interval

SUBSETS = 20_000
# up to so many prompts every subset is taken
_EXACT = 12
# if no more prompts than this depart from the middle difference, values that were not seen decide the mean
FEW = 5
# differences of probabilities are never quite equal
_NEAR = 0.02
_ELEMENTS = 2_000_000
LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """Two policies on the same prompts: the mean of first minus second, and the p of no difference.

    Both are corrected for `comparisons` (Bonferroni): the interval leaves out 0 exactly if `p` is at most 0.05, and all
    intervals together hold their means 95 times in 100.
    """

    prompts: int
    difference: Interval
    p: float
    comparisons: int = 1


def paired(first: Mapping[str, float], second: Mapping[str, float], comparisons: int = 1) -> Paired | None:
    """Compare two policies' scores in [0, 1] by prompt; None if they share no prompt.

    The prompts' own difficulty cancels in the difference, so it is known better than either score. `comparisons`: how many
    are looked at together. If 5 prompts or fewer depart from the median difference by more than 0.02, the interval also
    covers `plus_two`'s and p is the larger of both: equal differences of few prompts are no certainty.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        return None
    differences = np.array([first[prompt] - second[prompt] for prompt in common])
    level = LEVEL / comparisons
    low, high, p = sign_flips(differences, level)
    if (np.abs(differences - np.median(differences)) > _NEAR).sum() <= FEW:
        wider_low, wider_high, other_p = plus_two(differences, level)
        low, high, p = min(low, wider_low), max(high, wider_high), max(p, other_p)
    return Paired(len(common), Interval(float(differences.mean()), low, high), min(1.0, comparisons * p), comparisons)


def sign_flips(differences: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float, float]:
    """Low and high end of the mean's interval at 1 - `level`, and the two-sided p of a mean of 0, by flips of signs.

    Every set of flips up to 12 differences, else 20,000 random ones. Ends that nothing bounds are -1 and 1, the range of a
    difference of scores.
    """
    means = _subset_means(differences, seed)
    # flipping the signs of a subset makes the mean as large or larger exactly if the subset's own mean is 0 or less; the
    # flip of nothing counts on both sides
    number = len(means) + 1
    below, above = (1 + int((means <= 0).sum())) / number, (1 + int((means >= 0).sum())) / number
    # rounded: 0.05 / 2 * 2**n is often meant to be a whole number
    outside = int(round(level / 2 * number, 9))
    if outside == 0:
        return -1.0, 1.0, min(1.0, 2 * below, 2 * above)
    return float(means[outside - 1]), float(means[-outside]), min(1.0, 2 * below, 2 * above)


def plus_two(differences: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """The normal interval and p after one prompt more that the first policy won outright, and one that it lost.

    Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data".
    """
    more = np.append(differences, [1.0, -1.0])
    error = float(more.std() / np.sqrt(len(more)))
    reach = float(stats.norm.ppf(1 - level / 2)) * error
    mean = float(more.mean())
    p = 2 * float(stats.norm.sf(abs(mean) / error))
    return max(-1.0, mean - reach), min(1.0, mean + reach), p


def _subset_means(differences: np.ndarray, seed: int) -> np.ndarray:
    """Means of every, or of many random, subsets but the empty one, in ascending order."""
    number = len(differences)
    if number <= _EXACT:
        every = np.arange(1, 2**number)[:, None] >> np.arange(number) & 1
        means = every @ differences / every.sum(1)
    else:
        rng = np.random.default_rng(seed)
        parts = []
        for start in range(0, SUBSETS, at_once := max(1, _ELEMENTS // number)):
            chosen = rng.integers(0, 2, (min(at_once, SUBSETS - start), number), dtype=np.int8).astype(np.float64)
            sizes = chosen.sum(1)
            parts.append((chosen @ differences)[sizes > 0] / sizes[sizes > 0])
        means = np.concatenate(parts)
    # rounded: differences that cancel have a mean of 0 and not of the last bit
    return np.sort(np.round(means, 12))
