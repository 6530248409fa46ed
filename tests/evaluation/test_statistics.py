"""Intervals and tests against closed forms, another statistics library, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from pipeline.evaluation.rates.statistics import (
    RESAMPLES,
    bootstrap_mean,
    detectable,
    prompts_for,
    share,
    sign_test,
    wilson,
)


def test_the_interval_is_the_central_limit_theorems_for_many_values():
    values = np.random.default_rng(1).random(400)
    found = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.003)
    assert found.high == pytest.approx(values.mean() + half, abs=0.003)


def test_the_interval_is_scipys_percentile_bootstrap_and_the_same_every_time():
    # lopsided, so that other kinds of bootstrap give other ends
    values = np.random.default_rng(1).exponential(size=30).tolist()
    for seed in (0, 7):
        wanted = stats.bootstrap(
            (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        found = bootstrap_mean(values, seed) if seed else bootstrap_mean(values)
        assert (found.low, found.high) == (wanted.low, wanted.high)


def test_equal_values_have_no_width_and_none_no_mean():
    assert vars(bootstrap_mean([0.5] * 9)) == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 9}
    assert vars(bootstrap_mean([0.3])) == {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 1}
    assert vars(bootstrap_mean([0.0, 1.0])) == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


@pytest.mark.parametrize(("wins", "number"), [(0, 5), (3, 10), (17, 20), (40, 40), (61, 77)])
def test_wilson_is_statsmodels(wins, number):
    low, high = proportion_confint(wins, number, method="wilson")
    found = wilson(wins, number)
    assert (found.low, found.high) == pytest.approx((max(0, low), min(1, high)), abs=1e-12)
    assert found.n == number


def test_wilson_is_a_share_of_something():
    for wrong in ((0, 0), (4, 3), (-1, 3)):
        with pytest.raises(ValueError, match="successes of"):
            wilson(*wrong)
    assert wilson(1, 1).mean == 1.0
    assert all(wilson(number, number).high <= 1 and wilson(0, number).low >= 0 for number in range(1, 300))


@pytest.mark.parametrize(
    ("scores", "method"),
    [
        ([1.0] * 77, "wilson"),
        ([0.5] * 77, "wilson"),
        ([1.0, 0.0] * 25, "bootstrap"),
        ([1.0] * 72 + [0.0] * 5, "bootstrap"),
        ([1.0, 0.0] * 10, "wilson"),
        ([1.0, 0.5] * 38, "bootstrap"),
        ([1.0] * 76 + [0.0], "wilson"),
    ],
)
def test_a_share_of_few_or_agreeing_prompts_keeps_a_width(scores, method):
    found, used = share(scores)
    assert used == method
    assert found.low < found.mean <= found.high or found.mean == 1.0
    assert found.half_width > 0.01


def test_the_sign_test_is_the_binomials_tails():
    # 9 of 10: the two tails hold 1 + 10 ways each of 2**10
    assert sign_test(9, 1) == pytest.approx(22 / 1024)
    assert sign_test(0, 0) == 1.0
    assert sign_test(53, 12) == pytest.approx(stats.binomtest(12, 65).pvalue)


def test_the_detectable_difference_has_the_power_it_promises():
    scores = np.random.default_rng(3).choice([0.0, 0.5, 1.0], size=400).tolist()
    distance = detectable(scores)
    power = TTestPower().power(distance / np.std(scores, ddof=1), len(scores), 0.05)
    assert power == pytest.approx(0.8, abs=0.005)
    assert prompts_for(scores, distance / 3) == 3600
    assert detectable([1.0]) is None
    # a standard deviation of sqrt(1/2) over sqrt(2) prompts
    assert detectable([1.0, 0.0]) == pytest.approx((1.959964 + 0.841621) / 2, abs=1e-5)
    assert prompts_for([0.5, 0.5], 0.1) is None


@pytest.mark.parametrize(
    ("prompts", "win", "tie"), [(77, 0.69, 0.16), (30, 0.6, 0.1)], ids=["bootstrap", "wilson, few prompts"]
)
def test_a_95_percent_interval_covers_the_truth_95_times_in_100(prompts, win, tie):
    """2,000 simulated evaluations with a known win rate; README quotes what this prints."""
    rng = np.random.default_rng(5)
    truth, covered = win + tie / 2, 0
    for _ in range(2000):
        found, _ = share(rng.choice([1.0, 0.5, 0.0], p=[win, tie, 1 - win - tie], size=prompts))
        covered += found.low <= truth <= found.high
    print(f"{prompts} prompts: {covered / 2000:.4f} of 2,000 intervals hold the truth")
    assert 0.93 <= covered / 2000 <= 0.97


def test_shuffled_labels_are_even():
    rng = np.random.default_rng(6)
    missed = sum(
        not found.low <= 0.5 <= found.high
        for found, _ in (share(rng.permutation([1.0, 0.0] * 30 + [0.5] * 20)[:60]) for _ in range(20))
    )
    assert missed <= 3
    assert not math.isnan(share(rng.permutation([1.0, 0.0]).tolist())[0].mean)
