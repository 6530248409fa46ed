"""Which judges are said to share something with the one that made the pairs."""

import pytest

from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import _maker_of_the_pairs, _shared_with_the_maker

JUDGES = [
    "rule:sentiment=textblob:odd",
    "rule:no_repetition",
    "rule:contains=great",
    "implicit",
    "rule:sentiment=vader",
]


def shared(maker, judges=JUDGES, **generate):
    config = Config.model_validate({"data": {"path": "a.jsonl"}, "judge": judges, "generate": generate})
    return _shared_with_the_maker(config, maker)


def test_every_judge_whose_facts_are_known_is_compared_with_the_maker():
    assert shared("rule:sentiment=vader:even") == {
        "rule:sentiment=textblob:odd": [],
        "rule:no_repetition": [],
        "rule:sentiment=vader": ["the even half of words of sentiment", "the lexicon of vader"],
    }
    assert shared("rule:complete_and_concise")["rule:no_repetition"] == ["repeated words"]


def test_nothing_is_said_if_no_maker_is_named_or_its_facts_are_not_known():
    assert shared(None) == {}
    assert shared("rule:contains=dog") == {}
    assert shared("people") == {}
    assert shared("implicit") == {}


def test_what_is_to_make_later_pairs_made_none_of_these():
    assert shared(None, pair_judge="rule:complete_and_concise") == {}


def test_a_maker_is_found_by_its_label():
    judges = [{"name": "rule:no_repetition", "label": "mine"}, "rule:complete_and_concise"]
    assert shared("mine", judges) == {"mine": ["repeated words"], "rule:complete_and_concise": ["repeated words"]}


@pytest.mark.parametrize(
    ("judges", "maker"),
    [
        ({"rule:a": 3}, "rule:a"),
        ({"rule:a": 3, "rule:b": 1}, None),
        ({"rule:a": 3, "": 1}, None),
        ({"": 4}, None),
        ({}, None),
    ],
)
def test_a_maker_is_claimed_only_if_all_rows_name_it(judges, maker):
    assert _maker_of_the_pairs({"judges": judges}) == maker
    assert _maker_of_the_pairs({}) is None
