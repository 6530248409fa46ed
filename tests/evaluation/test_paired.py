"""Paired comparisons: the test against scipy's, its agreement with the interval, and how often both are wrong."""

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.rates.paired import paired, plus_two, sign_flips
from pipeline.evaluation.rates.statistics import bootstrap_mean


def compared(differences, comparisons=1):
    """`paired` of policies with these differences."""
    first = {str(n): max(0.0, float(one)) for n, one in enumerate(differences)}
    second = {str(n): max(0.0, -float(one)) for n, one in enumerate(differences)}
    return paired(first, second, comparisons)


def drawn(seed, number, values, chances):
    return np.random.default_rng(seed).choice(np.array(values, dtype=float), p=chances, size=number)


@pytest.mark.parametrize("number", [6, 9, 12])
def test_the_test_is_scipys_permutation_test_of_signs(number):
    differences = np.random.default_rng(number).normal(0.3, 0.5, number).clip(-1, 1)
    wanted = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flips(differences)[2] == pytest.approx(wanted.pvalue, abs=1e-12)


def test_many_prompts_give_the_t_tests_interval():
    differences = np.random.default_rng(1).normal(0.02, 0.2, 400).clip(-1, 1)
    low, high, p = sign_flips(differences)
    wanted = stats.ttest_1samp(differences, 0)
    assert (low, high) == pytest.approx(tuple(wanted.confidence_interval()), abs=0.002)
    assert p == pytest.approx(wanted.pvalue, abs=0.02)


@pytest.mark.parametrize("comparisons", [1, 3, 45])
def test_the_interval_leaves_out_zero_exactly_if_p_says_so(comparisons):
    decided = 0
    for seed in range(120):
        number = 6 + seed % 60
        some = np.array([0.05, 0.35, 0.2, 0.4]) if seed % 2 else np.array([0.02, 0.78, 0.02, 0.18])
        found = compared(drawn(seed, number, [-1, 0, 0.5, 1], some), comparisons)
        leaves_out = not found.difference.low <= 0 <= found.difference.high
        assert leaves_out == (found.p <= 0.05)
        decided += leaves_out
    assert 0 < decided < 120


@pytest.mark.parametrize(("value", "number"), [(0.0, 20), (1.0, 20), (0.0, 200)])
def test_equal_differences_are_no_certainty(value, number):
    found = compared([value] * number)
    assert found.difference.mean == value
    assert found.difference.low <= value - 1 / number or found.difference.high >= value + 1 / number
    assert (found.p <= 0.05) == (value != 0)


def test_probabilities_that_are_nearly_equal_are_no_certainty_either():
    """300 comparisons of 20 prompts by a judge that is sure: a tenth is gained, the rest differs by 0.015 at most."""
    held = 0
    for seed in range(300):
        noise = np.random.default_rng(seed).uniform(-0.015, 0.015, 20)
        interval = compared(0.9 * drawn(seed, 20, [0, 1], [0.9, 0.1]) + noise).difference
        held += interval.low <= 0.09 <= interval.high
    assert held >= 0.95 * 300


def test_plus_two_by_hand():
    # ten equal prompts, one more on each side: a variance of 2/12 over 12 prompts
    low, high, p = plus_two(np.zeros(10))
    assert (low, high) == pytest.approx((-0.23099, 0.23099), abs=1e-5)
    assert p == 1.0


def test_five_prompts_can_show_nothing():
    found = compared([1.0] * 5)
    assert (found.difference.low, found.difference.high, found.p) == (-1, 1, 2 / 32)


def test_pairing_cancels_what_the_prompts_share():
    rng = np.random.default_rng(4)
    difficulty = rng.uniform(0.2, 0.7, size=200)
    first = {str(n): difficulty[n] + 0.05 + 0.02 * rng.normal() for n in range(200)}
    second = {str(n): difficulty[n] + 0.02 * rng.normal() for n in range(200)} | {"only here": 9.0}
    found = paired(first, second)
    assert found.prompts == 200
    assert found.difference.low < 0.05 < found.difference.high
    assert found.difference.half_width < 0.01 < bootstrap_mean(list(first.values())).half_width
    assert found.p < 1e-3
    assert paired({"a": 1.0}, {"b": 1.0}) is None


@pytest.mark.parametrize("number", [10, 20, 50])
@pytest.mark.parametrize(
    ("values", "chances"),
    [([0, 1], [0.9, 0.1]), ([0, 1, -1], [0.65, 0.3, 0.05]), ([0, 1, -1], [0.6, 0.2, 0.2])],
    ids=["rare gains", "lopsided", "nothing"],
)
def test_a_95_percent_interval_holds_the_truth(number, values, chances):
    """300 simulated comparisons; a percentile bootstrap held rare gains of 20 prompts 86 times in 100."""
    truth, held = float(np.dot(values, chances)), 0
    for seed in range(300):
        interval = compared(drawn(seed, number, values, chances)).difference
        held += interval.low <= truth <= interval.high
    assert held >= 0.92 * 300


def test_many_comparisons_of_equal_policies_leave_out_zero_as_often_as_promised():
    """80 simulated sweeps of 5 equal policies on 77 prompts; uncorrected intervals leave out 0 in a third of them."""
    found = {1: 0, 10: 0}
    for seed in range(80):
        scores = drawn(seed, 5 * 77, [0, 0.5, 1], [0.4, 0.2, 0.4]).reshape(5, 77)
        policies = [{str(n): float(score) for n, score in enumerate(row)} for row in scores]
        for comparisons in found:
            found[comparisons] += any(
                paired(policies[a], policies[b], comparisons).p <= 0.05 for a in range(5) for b in range(a)
            )
    assert found[10] <= 0.09 * 80
    assert found[1] > 0.15 * 80
