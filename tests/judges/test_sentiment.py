"""Sentiment by lexicons: the packages' own scores, halves that share no word, texts that no lexicon of English reads; and the
pairs that were made by half of one.
"""

import json
import time

import pytest
import textblob.en
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from pipeline.config.rules import rule_problem
from pipeline.judges.judging import Prompt, Response, Shown
from pipeline.judges.rules import open_rule
from pipeline.judges.sentiment import in_half, sentiment
from stages.demo_data import RECIPES
from tests.conftest import ROOT

TEXTS = [
    "A wonderful, great day by the sea.",
    "It was NOT a good idea, and the food was horrible!!",
    "The train leaves at nine.",
    "",
    "I love it, but the terrible noise ruined a beautiful evening.",
]


def rewards(argument, *texts):
    judge = open_rule(f"sentiment={argument}", "j")
    return judge.reward([Shown(Prompt("p", "x", "", [1]), Response(text, "stop", (1,))) for text in texts])


def test_whole_lexicons_score_as_their_packages_do():
    analyzer = SentimentIntensityAnalyzer()
    assert [sentiment("vader")(text) for text in TEXTS] == [
        analyzer.polarity_scores(text)["compound"] for text in TEXTS
    ]
    assert [sentiment("textblob")(text) for text in TEXTS] == [textblob.en.sentiment(text)[0] for text in TEXTS]


@pytest.mark.parametrize("lexicon", ["vader", "textblob"])
def test_the_halves_of_a_lexicon_share_no_word_and_leave_none_out(lexicon):
    words = list(SentimentIntensityAnalyzer().lexicon if lexicon == "vader" else textblob.en.sentiment)
    halves = [{word for word in words if in_half(word, half)} for half in ("even", "odd")]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == len(set(words))
    assert all(len(half) > 0.4 * len(words) for half in halves)


def test_a_half_is_blind_to_the_words_of_the_other():
    scores = {
        word: [sentiment(f"{lexicon}:{half}")(word) for lexicon in ("vader", "textblob") for half in ("even", "odd")]
        for word in ("wonderful", "great", "horrible", "beautiful", "terrible", "happy", "awful", "perfect")
    }
    for word, (vader_even, vader_odd, textblob_even, textblob_odd) in scores.items():
        assert (vader_even == 0) != (vader_odd == 0)
        assert (textblob_even == 0) != (textblob_odd == 0)
        # the same words in both lexicons
        assert (vader_even == 0) == (textblob_even == 0) == in_half(word, "odd")
    assert len({values[0] == 0 for values in scores.values()}) == 2


def test_inflections_are_in_the_half_of_their_word():
    for words in (("happy", "happiness", "happily", "HAPPIER"), ("beautiful", "beauty", "beautifully")):
        assert len({in_half(word, "even") for word in words}) == 1


def test_a_half_leaves_the_package_s_own_lexicon_whole():
    before = len(textblob.en.sentiment)
    sentiment.cache_clear()
    sentiment("textblob:even")
    assert len(textblob.en.sentiment) == before


def test_rewards_are_shares_and_a_text_in_another_script_has_none():
    high, low, neutral, empty = rewards("vader", TEXTS[0], "horrible", TEXTS[2], TEXTS[3])
    assert 0.5 < high <= 1.0
    assert 0.0 <= low < neutral == empty == 0.5
    assert rewards("textblob", "Прекрасный день", "很好", "12:30!") == [None, None, 0.5]


@pytest.mark.parametrize("argument", ["afinn", "vader:half", "vader:", ":even"])
def test_a_lexicon_that_is_not_known_is_refused(argument):
    assert "expected vader or textblob" in rule_problem(f"sentiment={argument}")
    assert rule_problem("sentiment=vader:odd") is None
    assert "needs an argument: rule:sentiment=<lexicon>" in rule_problem("sentiment")


@pytest.mark.parametrize(
    "text", ["great " * 100_000, "(" * 200_000, "a" * 500_000, "not " * 50_000 + "!" * 50_000, "\u202e\ud800"]
)
@pytest.mark.parametrize("lexicon", ["vader:even", "textblob:odd"])
def test_a_hostile_text_is_marked_in_seconds(lexicon, text):
    begun = time.monotonic()
    (reward,) = rewards(lexicon, text)
    assert 0.0 <= reward <= 1.0
    assert time.monotonic() - begun < 20


def test_the_pairs_of_the_second_demo_are_as_its_readme_says():
    directory, recipe = ROOT / "data/demo", RECIPES["demo"]
    rows = {
        split: [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]
        for split in recipe.per_topic
    }
    openings = [json.loads(line) for line in (directory / "prompts.jsonl").read_text().splitlines()]
    # every fourth of a topic is held out
    places = {
        topic: [one["prompt"] for one in openings if one["topic"] == topic]
        for topic in {one["topic"] for one in openings}
    }
    assert {len(prompts) for prompts in places.values()} == {24}
    for split, found in rows.items():
        for row in found:
            assert (places[row["topic"]].index(row["prompt"]) % recipe.eval_every == 0) == (split == "eval")
            assert row["chosen_cut_off"]
            assert row["rejected_cut_off"]
            chosen, rejected = rewards(recipe.judge.removeprefix("rule:sentiment="), row["chosen"], row["rejected"])
            assert chosen - rejected == pytest.approx(row["margin"], abs=1e-3)
            assert row["margin"] >= recipe.margin
        assert f"| `{split}.jsonl` | {len(found)} | 12 |" in (directory / "README.md").read_text()
    assert len(rows["eval"]) >= 60
