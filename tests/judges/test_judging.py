"""Any judge is asked in both orders; what it says becomes win rates over prompts."""

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.rates.statistics import detectable, wilson
from pipeline.evaluation.rates.winrates import by_topic, comparison_scores, prompt_scores, win_rate
from pipeline.judges.judging import (
    Comparison,
    Duel,
    Judge,
    Judgement,
    Prompt,
    Response,
    by_reward,
    judge_both_orders,
    judge_implicitly,
    majority,
    winner_of,
)


def judged(scores, judge="j"):
    return [
        Judgement(str(n), 0, judge, "policy", "reference", order, winner_of(score, "policy", "reference"), score)
        for n, both in enumerate(scores)
        for order, score in zip(("policy_first", "reference_first"), both, strict=True)
    ]


def comparison(policy="a", reference="b", prompt="p", sample=0, models=("policy", "reference")):
    return Comparison(
        Prompt(prompt, f"prompt {prompt}"), sample, *models, Response(policy, "stop"), Response(reference, "stop")
    )


def always(value):
    return Judge("j", lambda duels: [value] * len(duels))


def test_wins_ties_losses_flips_and_failures_are_counted():
    rate = win_rate(judged([(1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (None, 1.0)]))
    assert (rate.prompts, rate.wins, rate.ties, rate.losses, rate.failed, rate.flips) == (5, 2, 2, 1, 1, 1)
    # a contradiction is a tie; 1 and 0.5 is a leaning
    mean = (1 + 0.75 + 0.5 + 0 + 0.5) / 5
    assert rate.rate.mean == pytest.approx(mean)
    assert rate.sign_test_p == pytest.approx(stats.binomtest(2, 3).pvalue)
    # what the failed prompt could have changed
    assert (rate.worst, rate.best) == pytest.approx((5 * mean / 6, (5 * mean + 1) / 6))
    assert win_rate(judged([(None, None)])) is None


def test_the_prompt_is_the_unit_not_the_sample():
    one = [Judgement("a", n, "j", "policy", "reference", "policy_first", "policy", 1.0) for n in range(99)]
    rate = win_rate([*one, Judgement("b", 0, "j", "policy", "reference", "policy_first", "reference", 0.0)])
    assert (rate.prompts, rate.rate.mean) == (2, 0.5)


@pytest.mark.parametrize("value", [1.0, 0.9])
def test_a_judge_of_positions_contradicts_itself_and_is_found_out(value):
    found = judge_both_orders(always(value), [comparison(prompt=str(n)) for n in range(40)])
    rate = win_rate(found)
    assert (rate.flips, rate.comparisons, rate.first_wins) == (40, 40, 1.0)
    assert rate.rate.mean == 0.5


def test_a_judge_of_texts_is_the_same_in_both_orders():
    judge = Judge("j", lambda duels: [float(duel.first.text == "a") for duel in duels])
    found = judge_both_orders(judge, [comparison()])
    assert [(one.order, one.winner, one.score) for one in found] == [
        ("policy_first", "policy", 1.0),
        ("reference_first", "policy", 1.0),
    ]
    assert win_rate(found).first_wins == 0.5


def test_failures_are_rows_of_their_own():
    assert [one.winner for one in judge_both_orders(always(None), [comparison()])] == ["failed", "failed"]


def test_equal_responses_are_ties_nobody_is_asked_about():
    def never(duels):
        raise AssertionError(duels)

    found = judge_both_orders(Judge("j", never), [comparison("a", "a")])
    assert [judgement.score for judgement in found] == [0.5, 0.5]


def test_a_model_against_itself_is_even_and_so_are_shuffled_labels():
    """20 evaluations of a model against itself with a judge of pure noise: the interval holds one half in 17 or more."""
    missed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = Judge("noise", lambda duels, rng=rng: rng.random(len(duels)).round().tolist())
        found = judge_both_orders(noise, [comparison(f"a{n}", f"b{n}", str(n)) for n in range(77)])
        missed += not win_rate(found).rate.low <= 0.5 <= win_rate(found).rate.high
    assert missed <= 3


def test_a_reward_is_asked_for_once_a_response():
    asked = []

    def reward(items):
        asked.extend(item.response.text for item in items)
        return [float(len(item.response.text)) for item in items]

    judge = by_reward("r", reward, tie=0.5)
    found = judge_both_orders(judge, [comparison("long", "x"), comparison("long", "same", sample=1)])
    assert [one.score for one in found] == [1.0, 1.0, 0.5, 0.5]
    assert sorted(asked) == ["long", "same", "x"]
    assert judge.reward([]) == []


def test_the_same_text_of_other_tokens_has_a_reward_of_its_own():
    judge = by_reward("first token", lambda items: [float(item.response.ids[0]) for item in items])
    low, high = (Response("a", "stop", ids=(token,)) for token in (1, 2))
    assert judge.prefer([Duel(Prompt("p", ""), high, low)]) == [1.0]


def test_the_majority_decides_a_panel():
    assert [majority(votes) for votes in ([1, 0.9, 0], [1, 0], [None, 0.2], [None, None], [0.5, 0.5, 1])] == [
        1.0,
        0.5,
        0.0,
        None,
        1.0,
    ]


def test_the_implicit_judge_looks_at_the_margins_sign():
    found = judge_implicitly("implicit", ["a", "a", "b"], [0.3, -0.1, 0.0])
    assert [(one.sample, one.winner, one.score) for one in found] == [
        (0, "policy", 1.0),
        (1, "reference", 0.0),
        (0, "tie", 0.5),
    ]


def test_topics_have_wilsons_intervals():
    found = by_topic(judged([(1.0, 1.0)] * 3 + [(0.0, 0.0)]), {"0": "x", "1": "x", "2": "y", "3": "y"})
    assert list(found) == ["x", "y"]
    assert found["y"] == wilson(1, 2)


def test_length_control_takes_the_differences_of_the_judged_prompts():
    rate = win_rate(judged([(1.0, 1.0), (0.0, 0.0)] * 20), {str(n): float(n % 2 * 200 - 100) for n in range(40)})
    # the longer one always loses: nothing is left of the difference at equal length
    assert rate.length_controlled.low < 0.5 < rate.length_controlled.high
    assert win_rate(judged([(1.0, 1.0)] * 20), {}).length_controlled is None
    assert prompt_scores(comparison_scores(judged([(1.0, 0.0)]))) == {"0": 0.5}


def only_score(scores):
    (found,) = comparison_scores(judged([scores])).values()
    return found.score, found.flipped


def test_a_contradiction_is_a_tie_however_sure_one_order_was_and_a_leaning_is_none():
    assert only_score((0.95, 0.2)) == (0.5, True)
    assert only_score((0.5, 0.2)) == (pytest.approx(0.35), False)
    assert only_score((0.9, 0.7)) == (pytest.approx(0.8), False)
    assert only_score((0.9, None)) == (None, False)


def test_a_rate_says_how_its_interval_was_made_and_what_it_could_have_shown():
    few = win_rate(judged([(1.0, 1.0), (0.0, 0.0)] * 10))
    many = win_rate(judged([(1.0, 1.0), (0.0, 0.0)] * 40))
    assert (few.method, many.method) == ("wilson", "bootstrap")
    assert few.detectable == detectable([1.0, 0.0] * 10) > many.detectable > 0


def test_the_first_response_wins_in_decided_verdicts_of_both_orders_only():
    rate = win_rate(judged([(1.0, 0.0), (0.5, 0.5), (None, 1.0), (1.0, 1.0)]))
    # first, first; nobody; the policy as second; the policy as first and as second
    assert rate.first_wins == pytest.approx(3 / 5)
    pairs = [Judgement("a", 0, "j", "policy", "reference", "pair", "policy", 1.0)]
    assert win_rate(pairs).first_wins is None
    assert win_rate(judged([(0.5, 0.5)])).first_wins is None


def test_the_best_topic_comes_first_and_equal_ones_by_name():
    scores = [(0.0, 0.0), (1.0, 1.0), (1.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    topics = {"0": "a", "1": "z", "2": "m", "3": "b", "4": "k"}
    assert list(by_topic(judged(scores), topics)) == ["k", "m", "z", "b", "a"]
