"""Which judges are said to share something with the one that made the pairs."""

from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import _shared_with_the_maker

JUDGES = [
    "rule:sentiment=textblob:odd",
    "rule:no_repetition",
    "rule:contains=great",
    "implicit",
    "rule:sentiment=vader",
]


def shared(**generate):
    return _shared_with_the_maker(
        Config.model_validate({"data": {"path": "a.jsonl"}, "judge": JUDGES, "generate": generate})
    )


def test_every_judge_whose_facts_are_known_is_compared_with_the_maker():
    assert shared(pair_judge="rule:sentiment=vader:even") == {
        "rule:sentiment=textblob:odd": [],
        "rule:no_repetition": [],
        "rule:sentiment=vader": ["the even half of words of sentiment", "the lexicon of vader"],
    }
    assert shared(pair_judge="rule:complete_and_concise")["rule:no_repetition"] == ["repeated words"]


def test_nothing_is_said_if_no_maker_is_named_or_its_facts_are_not_known():
    assert shared() == {}
    assert shared(pair_judge="rule:contains=dog") == {}


def test_a_maker_is_found_by_its_label():
    judges = [{"name": "rule:no_repetition", "label": "mine"}, "rule:complete_and_concise"]
    config = Config.model_validate({"data": {"path": "a.jsonl"}, "judge": judges, "generate": {"pair_judge": "mine"}})
    assert _shared_with_the_maker(config) == {
        "mine": ["repeated words"],
        "rule:complete_and_concise": ["repeated words"],
    }
