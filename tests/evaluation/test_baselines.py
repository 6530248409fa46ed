"""Trivial baselines by hand: what length, cutting and shuffling reach, by judges that need no model."""

import numpy as np
import pytest

from pipeline.config.judges import JudgeConfig
from pipeline.evaluation.baselines import (
    Pair,
    by_ending,
    cut_rates,
    first_sentence,
    gain_by_length,
    length_baselines,
    needs_no_model,
    pair_baselines,
    together,
    whole_sentences,
)
from pipeline.evaluation.figures import judge_texts, win_figures
from pipeline.evaluation.results import Baselines
from pipeline.judges.judging import Comparison, Judge, Judgement, Prompt, Response, judge_both_orders
from pipeline.judges.rules import open_rule


def response(text, finish="stop", tokens=None):
    return Response(text, finish, tuple(range(len(text) if tokens is None else tokens)))


def comparison(number, policy, reference, sample=0):
    return Comparison(Prompt(f"p{number}", "?"), sample, "policy", "reference", policy, reference)


@pytest.mark.parametrize(
    ("text", "first", "whole"),
    [
        ("One. Two. Thr", "One.", "One. Two."),
        ('She said "No!" Then she', 'She said "No!"', 'She said "No!"'),
        ("It costs 3.50 a kilo. And", "It costs 3.50 a kilo.", "It costs 3.50 a kilo."),
        ("1. Wash the rice.\n2. Boil", "1. Wash the rice.", "1. Wash the rice."),
        ("**2.** Bold", "**2.** Bold", "**2.** Bold"),
        ("No end in sight", "No end in sight", "No end in sight"),
        ("", "", ""),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01\u5c31", "\u4f60\u597d\u3002", "\u4f60\u597d\u3002\u518d\u89c1\uff01"),
        ("Wait... what? Yes", "Wait...", "Wait... what?"),
        # Arabic, Hindi, Khmer, Amharic
        (
            "\u0643\u064a\u0641\u061f \u0646\u0639\u0645. \u062b",
            "\u0643\u064a\u0641\u061f",
            "\u0643\u064a\u0641\u061f \u0646\u0639\u0645.",
        ),
        ("\u0939\u093e\u0901\u0964 \u0924\u092c", "\u0939\u093e\u0901\u0964", "\u0939\u093e\u0901\u0964"),
        ("\u1794\u17b6\u1791\u17d4 \u178a", "\u1794\u17b6\u1791\u17d4", "\u1794\u17b6\u1791\u17d4"),
        ("\u12a0\u12ce\u1362 \u1290", "\u12a0\u12ce\u1362", "\u12a0\u12ce\u1362"),
    ],
)
def test_sentences_end_where_a_reader_sees_it(text, first, whole):
    assert (first_sentence(text), whole_sentences(text)) == (first, whole)


def test_the_reference_cut_is_judged_against_itself_uncut():
    judge = open_rule("max_words=2", "short")
    whole = [
        response("One word. Then many more of them", "length"),  # wins as a sentence, and as whole sentences
        response("One word. Then two", "stop"),  # ended by itself: loses nothing as whole sentences
        response("Short one.", "stop"),  # nothing to cut: a tie
        response("no sentence ends here at all", "length"),  # likewise
    ]
    found = cut_rates(judge, [comparison(number, response("anything"), one) for number, one in enumerate(whole)])
    assert found.first_sentence.mean == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert found.whole_sentences.mean == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    # the policy's own responses are not what is cut
    assert found.shorter is None


def test_what_is_cut_counts_as_ended():
    found = cut_rates(
        open_rule("complete_and_concise", "j"), [comparison(0, response("x"), response("A b. C", "length"))]
    )
    assert found.first_sentence.mean == found.whole_sentences.mean == 1


def test_rules_alone_are_asked():
    free = {
        "rule:no_repetition": True,
        "panel:[rule:no_repetition, rule:contains=a]": True,
        "panel:[rule:no_repetition, llm:x]": False,
        "llm:x": False,
        "reward_model:x": False,
    }
    assert {name: needs_no_model(JudgeConfig(name=name)) for name in free} == free


def test_length_alone_by_hand():
    # tokens of policy and reference; what the judge says of the policy in both orders
    rows = [(3, 5, 1.0), (3, 5, 0.0), (9, 2, 0.0), (4, 4, 1.0)]
    comparisons = [
        comparison(number, response("a", tokens=a), response("b", tokens=b)) for number, (a, b, _) in enumerate(rows)
    ]
    judge = Judge("j", lambda duels: [_score(duel, rows) for duel in duels])
    found = length_baselines(judge_both_orders(judge, comparisons), comparisons)
    # the shorter one won, lost, won; equal lengths say nothing
    assert found.shorter.mean == pytest.approx(2 / 3)
    assert found.longer.mean == pytest.approx(1 / 3)
    assert found.longer.low == pytest.approx(1 - found.shorter.high)
    assert (found.shorter.n, found.longer.n) == (3, 3)
    assert length_baselines([], []) == Baselines()


def _score(duel, rows):
    said = rows[int(duel.prompt.prompt_id[1:])][2]
    return said if duel.first.text == "a" else 1 - said


def test_a_judge_of_length_alone_is_seen_through():
    rng = np.random.default_rng(0)
    comparisons = [
        comparison(number, *(response("word " * int(rng.integers(1, 30))) for _ in range(2))) for number in range(80)
    ]
    judgements = judge_both_orders(open_rule("max_words=15", "short"), comparisons)
    figures = win_figures(judgements, comparisons)
    assert figures.baselines["short"].shorter.low > 0.6
    assert abs(figures.judges["short"].rate.mean - 0.5) < 0.15


def test_what_length_predicts_of_held_out_pairs():
    pairs = [Pair("a", 3, 5, 0.2), Pair("b", 3, 5, -1.0), Pair("c", 7, 5, 0.1), Pair("d", 5, 5, 0.1)]
    found = pair_baselines(pairs)
    assert found.shorter.mean == pytest.approx(2.5 / 4)
    assert found.longer.mean == pytest.approx(1.5 / 4)
    # pairs of one prompt are one observation
    assert pair_baselines([Pair("a", 1, 2, 1.0), Pair("a", 2, 1, 1.0), Pair("b", 1, 2, 1.0)]).shorter.mean == 0.75


def test_shuffled_labels_are_right_half_the_time_within_what_was_simulated():
    rng = np.random.default_rng(1)
    margins = rng.normal(size=60)
    margins[:10] = 0.0
    found = pair_baselines([Pair(str(number), 1, 2, margin) for number, margin in enumerate(margins)]).shuffled
    signs = rng.choice([-1, 1], size=(20_000, 60))
    shuffled = (signs * margins > 0).mean(1)
    assert found.mean == pytest.approx(25 / 60)
    assert found.n == 60
    assert np.quantile(shuffled, [0.025, 0.975]) == pytest.approx([found.low, found.high], abs=1.01 / 60)


def test_both_sides_baselines_are_put_together():
    one, other = cut_rates(open_rule("max_words=2", "j"), [comparison(0, response("x"), response("a. b"))]), Baselines()
    assert together(other, one) == together(one, other) == one


def test_win_rates_apart_by_how_responses_ended():
    rows = [
        ("stop", "stop", 0.0),
        ("stop", "stop", 1.0),
        ("stop", "length", 1.0),
        ("length", "stop", 1.0),
        ("length", "length", 0.5),
    ]
    comparisons = [comparison(number, response("a", a), response("b", b)) for number, (a, b, _) in enumerate(rows)]
    judgements = judge_both_orders(Judge("j", lambda duels: [_score(duel, rows) for duel in duels]), comparisons)
    found = by_ending(judgements, comparisons)
    assert (found["both ended"].prompts, found["both ended"].rate.mean) == (2, 0.5)
    assert (found["some cut off"].comparisons, found["some cut off"].rate.mean) == (3, pytest.approx(2.5 / 3))
    assert found["both ended"].rate.low < 0.5 < found["both ended"].rate.high
    assert by_ending(
        judgements,
        [one for one in comparisons if "length" not in (one.response.finish_reason, one.against.finish_reason)],
    ).keys() == {"both ended"}
    assert win_figures(judgements, comparisons).endings["j"] == found


def test_comparisons_that_failed_are_counted_and_in_no_rate():
    comparisons = [comparison(number, response("a"), response("b")) for number in range(2)]
    judge = Judge(
        "j",
        lambda duels: [None if duel.prompt.prompt_id == "p0" else _score(duel, [(), ("", "", 1.0)]) for duel in duels],
    )
    found = by_ending(judge_both_orders(judge, comparisons), comparisons)["both ended"]
    assert (found.prompts, found.comparisons, found.rate.mean) == (1, 2, 1)


def test_gain_against_length_is_of_rewards_where_a_judge_gives_them():
    comparisons = [
        comparison(0, response("a a", tokens=7), response("a", tokens=4)),
        comparison(0, response("a a a a", tokens=1), response("a", tokens=4), sample=1),
        comparison(1, response("a", tokens=2), response("a a", tokens=2)),
        Comparison(Prompt("p1", "?"), 0, "other", "reference", response("z", tokens=99), response("a a")),
    ]
    rewards = Judge(
        "j", lambda duels: [1.0] * len(duels), lambda items: [float(len(item.response.text)) for item in items]
    )
    said = judge_texts(rewards, comparisons, [])
    assert said.margins == [2, 6, -2, -2]
    found = gain_by_length(said.judgements, said.margins, comparisons)
    assert (found.rewards, found.points) == (True, [(0.0, 4.0), (0.0, -2.0)])
    verdicts = judge_texts(
        Judge("j", lambda duels: [float(len(duel.first.text) > len(duel.second.text)) for duel in duels]),
        comparisons,
        [],
    )
    found = gain_by_length(verdicts.judgements, verdicts.margins, comparisons)
    assert (found.rewards, found.points) == (False, [(0.0, 0.5), (0.0, -0.5)])


def test_the_implicit_judges_pairs_are_no_comparisons():
    judged = [Judgement("p0", 0, "implicit", "policy", "reference", "pair", "policy", 1.0)]
    figures = win_figures(judged, [comparison(0, response("a", "length"), response("bb"))])
    assert not figures.endings
    assert not figures.baselines
