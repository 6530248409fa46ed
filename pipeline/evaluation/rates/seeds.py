"""Two methods, each trained from several seeds: a difference of methods must be larger than what another seed would make.

Prompts alone say how sure a comparison of two trained models is. Of two methods, the seeds of training vary too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from pipeline.evaluation.rates.paired import LEVEL, Paired
from pipeline.evaluation.rates.statistics import Interval

Scores = Mapping[str, float]


def over_seeds(first: Sequence[Scores], second: Sequence[Scores], comparisons: int = 1) -> Paired | None:
    """Compare two methods, a mapping of prompts to scores for each seed; None if not all share a prompt.

    The variance is that between seeds of each method plus that between prompts (Cameron, Gelbach and Miller 2011, "Robust
    inference with multiway clustering", without the term that they subtract: a little too wide), the interval Student's t
    with Welch and Satterthwaite's degrees of freedom. Corrected for `comparisons` (Bonferroni). Raises ValueError for a
    method with one seed: nothing says how much seeds vary.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("a method needs two seeds or more")
    common = sorted(set.intersection(*(set(scores) for scores in (*first, *second))))
    if not common:
        return None
    one, other = (np.array([[seed[prompt] for prompt in common] for seed in method]) for method in (first, second))
    by_prompt = one.mean(0) - other.mean(0)
    mean = float(by_prompt.mean())
    # each a source of variance: means that vary independently, seeds of one method, of the other, prompts
    sources = [source for source in (one.mean(1), other.mean(1), by_prompt) if len(source) > 1]
    variances = np.array([source.var(ddof=1) / len(source) for source in sources])
    if variances.sum() == 0:
        return Paired(len(common), Interval(mean, -1.0, 1.0), 1.0, comparisons)
    freedom = variances.sum() ** 2 / sum(v**2 / (len(s) - 1) for v, s in zip(variances, sources, strict=True))
    error = float(np.sqrt(variances.sum()))
    reach = float(stats.t.ppf(1 - LEVEL / comparisons / 2, freedom)) * error
    p = min(1.0, comparisons * 2 * float(stats.t.sf(abs(mean) / error, freedom)))
    return Paired(len(common), Interval(mean, max(-1.0, mean - reach), min(1.0, mean + reach)), p, comparisons)
