"""Win rates against closed forms; what a judge says in both orders becomes one score."""

import numpy as np
import pytest
from scipy import stats

from pipeline.judges import Comparison, Judgement, Response, judge_both_orders, judge_implicitly, open_judge, winner_of
from pipeline.statistics import bootstrap_mean, win_rate


def judged(scores, judge="j"):
    return [
        Judgement(str(n), 0, judge, order, winner_of(score), score)
        for n, both in enumerate(scores)
        for order, score in zip(("policy_first", "reference_first"), both, strict=True)
    ]


def test_the_interval_is_the_central_limit_theorems_for_many_values():
    values = np.random.default_rng(1).random(400)
    found = bootstrap_mean(values.tolist())
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.003)
    assert found.high == pytest.approx(values.mean() + half, abs=0.003)


def test_equal_values_have_no_width():
    assert vars(bootstrap_mean([0.5] * 9)) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_wins_ties_losses_flips_and_failures_are_counted():
    rate = win_rate(judged([(1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (None, 1.0)]))
    assert (rate.prompts, rate.wins, rate.ties, rate.losses, rate.failed, rate.flips) == (5, 2, 2, 1, 1, 1)
    # a contradiction is a tie; 1 and 0.5 is a leaning
    assert rate.rate.mean == pytest.approx((1 + 0.75 + 0.5 + 0 + 0.5) / 5)
    assert rate.sign_test_p == pytest.approx(stats.binomtest(2, 3).pvalue)
    assert win_rate(judged([(None, None)])) is None


def test_the_prompt_is_the_unit_not_the_sample():
    one = [Judgement("a", n, "j", "policy_first", "policy", 1.0) for n in range(99)]
    rate = win_rate([*one, Judgement("b", 0, "j", "policy_first", "reference", 0.0)])
    assert (rate.prompts, rate.rate.mean) == (2, 0.5)


def comparison(policy, reference):
    return Comparison("p", 0, "How do I boil rice?", Response(*policy), Response(*reference))


def test_a_judge_of_positions_contradicts_itself():
    pair = comparison(("a", "stop"), ("b", "stop"))
    found = judge_both_orders("first", lambda duels: [1.0] * len(duels), [pair])
    assert [judgement.score for judgement in found] == [1.0, 0.0]
    assert win_rate(found).flips == 1


def test_equal_responses_are_ties_nobody_is_asked_about():
    same = comparison(("a", "stop"), ("a", "stop"))
    found = judge_both_orders("j", lambda duels: [1 / 0] if duels else [], [same])
    assert [judgement.score for judgement in found] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("rule:complete_and_concise", ("Boil the rice for ten minutes.", "stop"), ("Boil the rice for ten", "length")),
        ("rule:complete_and_concise", ("Boil the rice.", "stop"), ("Boil the rice. " * 60, "stop")),
        ("rule:complete_and_concise", ("Boil the rice.", "stop"), ("The cat sat on the mat.", "stop")),
        ("rule:no_repetition", ("Boil the rice for ten minutes.", "stop"), ("Boil it well now. " * 9, "stop")),
    ],
)
def test_rules_prefer_what_they_say(name, better, worse):
    for policy, reference, winner in ((better, worse, "policy"), (worse, better, "reference")):
        found = judge_both_orders(name, open_judge(name), [comparison(policy, reference)])
        assert {judgement.winner for judgement in found} == {winner}


def test_the_implicit_judge_looks_at_the_margins_sign():
    found = judge_implicitly(["a", "a", "b"], [0.3, -0.1, 0.0])
    assert [(one.sample, one.winner, one.score) for one in found] == [
        (0, "policy", 1.0),
        (1, "reference", 0.0),
        (0, "tie", 0.5),
    ]
