"""From judgements to scores: what both orders of a judge of probabilities say together, and failures of single samples."""

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.rates.winrates import both_orders, comparison_scores, prompt_scores, win_rate
from pipeline.judges.judging import Judgement, winner_of


def judgements(scores, sample=0):
    """Judgements of one prompt after another from (score in one order, score in the other)."""
    return [
        Judgement(f"p{n}", sample, "j", "policy", "reference", order, winner_of(score, "policy", "reference"), score)
        for n, both in enumerate(scores)
        for order, score in zip(("policy_first", "reference_first"), both, strict=True)
    ]


def logit(chance):
    return np.log(chance / (1 - chance))


def test_a_soft_contradiction_leans_to_the_surer_order_and_is_still_counted():
    rate = win_rate(judgements([(0.95, 0.2)]))
    mean = (logit(0.95) + logit(0.2)) / 2
    assert rate.rate.mean == pytest.approx(1 / (1 + np.exp(-mean)))
    assert (rate.flips, rate.wins, rate.ties) == (1, 1, 0)


def test_a_leaning_to_the_first_position_cancels():
    odds = logit(0.6)
    for leaning in (0.0, 0.7, 3.0):
        both = [1 / (1 + np.exp(-(odds + side * leaning))) for side in (1, -1)]
        assert both_orders(judgements([both]))["p0", 0].score == pytest.approx(0.6)


def test_opposite_probabilities_are_a_tie_to_the_last_bit():
    assert [one.score for one in both_orders(judgements([(0.9, 1 - 0.9), (0.3, 0.7), (0.8, 0.8)])).values()] == [
        0.5, 0.5, pytest.approx(0.8),
    ]  # fmt: skip


def test_verdicts_without_shades_and_failures_stay_as_they_were():
    hard = judgements([(1.0, 0.0), (1.0, 0.5), (0.5, 0.5), (None, 1.0)])
    assert both_orders(hard) == comparison_scores(hard)
    assert both_orders(judgements([(0.7, None)]))["p0", 0].score is None


def test_certainty_in_one_order_is_not_infinite():
    found = both_orders(judgements([(1.0, 0.3), (0.0, 0.3)]))
    assert 0.5 < found["p0", 0].score < 1
    assert 0 < found["p1", 0].score < 0.1


def test_a_soft_judge_that_leans_to_one_position_keeps_its_power():
    """300 simulated evaluations of 100 prompts, leaning by 2 in log-odds; ties for contradictions find a third."""
    rng = np.random.default_rng(0)
    found = {both_orders: 0, comparison_scores: 0}
    for _ in range(300):
        odds = 0.3 + rng.normal(size=100)
        sides = [1 / (1 + np.exp(-(odds + side * 2 + 0.5 * rng.normal(size=100)))) for side in (1, -1)]
        said = judgements(zip(*(side.tolist() for side in sides), strict=True))
        for combine in found:
            scores = list(prompt_scores(combine(said)).values())
            found[combine] += stats.ttest_1samp(scores, 0.5).pvalue < 0.05
    assert found[comparison_scores] < 0.45 * 300
    assert found[both_orders] > 0.7 * 300


def test_failures_of_single_samples_are_counted_and_bound_the_rate():
    said = [one for sample in range(4) for one in judgements([(1.0, 1.0 if sample < 2 else None)], sample)]
    rate = win_rate(said)
    assert (rate.prompts, rate.failed, rate.comparisons) == (1, 2, 4)
    assert (rate.rate.mean, rate.worst, rate.best) == (1.0, 0.5, 1.0)
