"""The outcome in words: what the verdict follows, what other judges say, and what could mislead."""

import pytest

from pipeline.report.words import cautions, second_opinions, verdict
from tests.report.evaluations import figures, rate, typed


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.7, 0.6, 0.8), "is better"), ((0.5, 0.4, 0.6), "No difference"), ((0.2, 0.1, 0.3), "is worse")],
)
def test_the_verdict_follows_the_interval(interval, words):
    assert words in verdict(typed(figures(*interval)))
    assert f"{interval[0]:.0%}" in verdict(typed(figures(*interval)))


def test_judges_that_made_the_pairs_are_named_and_others_agree_or_do_not():
    results = figures(0.7, 0.6, 0.8, better=rate(), even=rate(0.5, 0.4, 0.6), worse=rate(0.2, 0.1, 0.3))
    before = second_opinions(typed(results))
    assert [line.split(":")[0] for line in before[1:]] == [
        "better agrees", "even shows no difference", "worse disagrees",
    ]  # fmt: skip
    related = second_opinions(typed(results | {"shared": {"better": ["length", "repeated words"]}}))
    assert "better, which uses length and repeated words as the judge that made the pairs does, agrees" in related[1]
    found = second_opinions(typed(results | {"shared": {"better": [], "even": [], "worse": []}}))
    assert found[0] == "rule:no_repetition also chose the training pairs: weigh the other judges more."
    assert [line.split(":")[0] for line in found[1:]] == [
        "better, which uses nothing that the judge that made the pairs does, agrees",
        "even, which uses nothing that the judge that made the pairs does, shows no difference",
        "worse, which uses nothing that the judge that made the pairs does, disagrees",
    ]


def test_a_leading_judge_that_made_no_pair_says_so_and_the_maker_is_named_behind_it():
    results = figures(0.7, 0.6, 0.8, maker=rate()) | {"pair_judge": "maker", "shared": {"rule:no_repetition": []}}
    of_the_leading, of_the_maker = second_opinions(typed(results))
    assert of_the_leading == "rule:no_repetition uses nothing that the judge that made the pairs does."
    assert of_the_maker.startswith("maker, which chose the training pairs, agrees: 70%")
    results["shared"] = {"rule:no_repetition": ["length"]}
    assert second_opinions(typed(results))[0] == (
        "rule:no_repetition uses length as the judge that made the pairs does."
    )


def test_a_headline_that_rests_on_the_maker_of_the_pairs_says_so_in_the_same_sentence():
    found = figures(0.7, 0.6, 0.8)
    assert verdict(typed(found)) == (
        "The policy is better than the reference: rule:no_repetition, which also chose the training pairs and so is no "
        "independent judge, prefers it on 70% of 40 prompts (95 % interval 60% to 80%)."
    )
    assert second_opinions(typed(found)) == []
    of_samples = typed(found | {"learnt_from": "samples"})
    assert "which also rewarded the training samples and so is no independent judge," in verdict(of_samples)
    shared = figures(0.7, 0.6, 0.8, maker=rate()) | {"pair_judge": "maker", "shared": {"rule:no_repetition": []}}
    said = second_opinions(typed(shared | {"learnt_from": "samples"}))
    assert said[0] == "rule:no_repetition uses nothing that the judge that rewarded the samples does."
    assert said[1].startswith("maker, which rewarded the training samples, agrees: 70%")
    assert "chose the training pairs" not in verdict(typed(found | {"pair_judge": "another"}))
    assert "chose the training pairs" not in verdict(typed(found | {"pair_judge": None}))


def test_n_stands_beside_rates_that_took_no_training():
    found = figures(0.5, 0.4, 0.6, implicit=rate(0.8, 0.7, 0.9))
    found["baselines"]["rule:no_repetition"] = {"shorter": {"mean": 0.62, "low": 0.51, "high": 0.7, "n": 31}}
    assert "by the same judge: 62% of 31 prompts (95 % interval 51% to 70%)." in verdict(typed(found))
    found["baselines"]["implicit"] = {"shuffled": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 44}}
    assert second_opinions(typed(found))[-1].endswith("better: 90% of 44 held-out pairs (95 % interval 80% to 100%).")
    assert "80% of held-out pairs of 40 prompts" in second_opinions(typed(found))[-2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "40 prompts show a difference of 12 points four times in five; 230 would show 5 points"),
        ({"failed": 4, "worst": 0.6, "best": 0.75}, "failed on 4 of 40 comparisons; had all of them been lost or won"),
        ({"flips": 20}, "contradicted itself on 20 of 40"),
        ({"first_wins": 0.8}, "prefers the response that stands first in 80% of its verdicts on 40 comparisons."),
        (
            {"length_controlled": {"mean": 0.5, "low": 0.4, "high": 0.6}},
            "at equal length the rate on 40 prompts would be 50% (95 % interval 40% to 60%), so length explains part of",
        ),
        (
            {"length_controlled": None, "length_withheld": "so it is"},
            "No rate at equal length is given for j, because so it is.",
        ),
    ],
)
def test_what_could_mislead_is_said(changes, words):
    found = figures()
    found["judges"] = {"j": rate(**changes)}
    assert any(words in line for line in cautions(typed(found)))


def test_lengths_that_differ_are_said_with_what_can_be_done_about_them():
    found = figures()
    found["responses"] = {
        "policy": found["responses"]["policy"] | {"words": 2.0},
        "reference": found["responses"]["policy"],
    }
    assert any("0.10 times as long" in line and "take that out" in line for line in cautions(typed(found)))
    found["judges"]["rule:no_repetition"]["length_controlled"] = None
    assert any("hardly overlap" in line for line in cautions(typed(found)))


def test_cut_off_responses_of_every_model_are_warned_of():
    found = figures(0.7, 0.6, 0.8)
    shares = {"policy": 0.05, "reference": 0.4, "sft": 0.2}
    seen = {name: found["responses"]["policy"] | {"cut_off": share} for name, share in shares.items()}
    said = cautions(typed(found | {"responses": seen}))
    assert any(line.startswith("40% of the 40 responses of reference were cut off") for line in said)
    assert any(line.startswith("20% of the 40 responses of sft were cut off") for line in said)
    assert not any("of policy were cut off" in line for line in said)
    seen = {name: found["responses"]["policy"] | {"cut_off": 1.0} for name in shares}
    said = cautions(typed(found | {"responses": seen}))
    assert [line for line in said if "longest allowed length" in line] == [
        "No response was ended by its model: all 120 were written to the longest allowed length, so there is no win rate of those that ended."
    ]


def test_a_headline_that_a_trivial_baseline_beats_says_so():
    found = figures(0.8, 0.7, 0.9)
    assert verdict(typed(found)).count(".") == 1
    better = {
        "shorter": {"mean": 0.82, "low": 0.7, "high": 0.9},
        "first_sentence": {"mean": 0.84, "low": 0.75, "high": 0.91},
    }
    found["baselines"]["rule:no_repetition"] |= better
    assert verdict(typed(found)).endswith(
        " The reference cut to its first sentence does better by the same judge: 84% (95 % interval 75% to 91%)."
    )
    # nobody claims anything where the policy is not better, unless the baseline is
    found["judges"]["rule:no_repetition"] = rate(0.5, 0.4, 0.6)
    found["baselines"]["rule:no_repetition"] = {"shorter": {"mean": 0.52, "low": 0.4, "high": 0.6}}
    assert "The shorter" not in verdict(typed(found))
    found["baselines"]["rule:no_repetition"] = {"shorter": {"mean": 0.62, "low": 0.51, "high": 0.7}}
    assert "The shorter of the two responses, whoever wrote it, does better by the same judge: 62%" in verdict(
        typed(found)
    )


def test_kl_that_lies_in_the_end_is_said():
    found = figures(0.7, 0.6, 0.8)
    assert "20% of the policy's KL lies in the token that ends a response." in cautions(typed(found))
    found["cost"]["policy"]["positions"][0]["sampled"] = 60.0
    assert not any("ends a response" in line for line in cautions(typed(found)))
