"""Methods over several seeds: both sources of variance, by hand and by simulation."""

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.rates.paired import paired
from pipeline.evaluation.rates.seeds import over_seeds


def trained(rng, mean, seeds=3, prompts=100, between_seeds=0.05):
    """Scores of a method: prompts' noise around each seed's own mean."""
    means = mean + between_seeds * rng.normal(size=seeds)
    return [
        {str(n): score for n, score in enumerate((one + 0.2 * rng.normal(size=prompts)).clip(0, 1))} for one in means
    ]


def test_prompts_without_a_difference_leave_welchs_test_of_the_seeds():
    first, second = [0.5, 0.6, 0.7], [0.4, 0.5]
    found = over_seeds(*([dict.fromkeys("abcd", mean) for mean in method] for method in (first, second)))
    wanted = stats.ttest_ind(first, second, equal_var=False)
    interval = wanted.confidence_interval()
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_seeds_without_a_difference_leave_the_t_test_of_the_prompts():
    rng = np.random.default_rng(0)
    one, other = ({str(n): value for n, value in enumerate(rng.random(30))} for _ in range(2))
    found = over_seeds([one, one], [other, other], comparisons=3)
    gaps = [one[prompt] - other[prompt] for prompt in one]
    wanted = stats.ttest_1samp(gaps, 0)
    interval = wanted.confidence_interval(1 - 0.05 / 3)
    assert found.p == pytest.approx(min(1, 3 * wanted.pvalue))
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))


def test_one_seed_says_nothing_of_seeds_and_equal_scores_are_no_certainty():
    with pytest.raises(ValueError, match="two seeds"):
        over_seeds([{"a": 1.0}], [{"a": 1.0}, {"a": 0.0}])
    assert over_seeds([{"a": 1.0}] * 2, [{"b": 1.0}] * 2) is None
    found = over_seeds([{"a": 1.0}] * 2, [{"a": 1.0}] * 2)
    assert (found.difference.low, found.difference.high, found.p) == (-1, 1, 1)


def test_equal_methods_are_told_apart_as_rarely_as_promised_and_others_often():
    """300 simulated pairs of equal methods; prompts alone, over the seeds' means, claim a difference in a quarter."""
    rng = np.random.default_rng(1)
    prompts_alone = with_seeds = found = 0
    for _ in range(300):
        first, second = trained(rng, 0.5), trained(rng, 0.5)
        means = [{n: float(np.mean([seed[n] for seed in method])) for n in method[0]} for method in (first, second)]
        prompts_alone += paired(*means).p <= 0.05
        with_seeds += over_seeds(first, second).p <= 0.05
        found += over_seeds(trained(rng, 0.7), second).p <= 0.05
    assert prompts_alone > 0.25 * 300
    assert with_seeds <= 0.07 * 300
    assert found > 0.7 * 300
