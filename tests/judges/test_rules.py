"""Every rule prefers what it says, with its argument; names and arguments that mean nothing are refused."""

import pytest

from pipeline.config.judges import JudgeConfig
from pipeline.config.rules import RULES, rule_problem
from pipeline.judges.judging import Comparison, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.judges.rules import MARKS

CASES = [
    ("complete_and_concise", ("Boil the rice for ten minutes.", "stop"), ("Boil the rice for ten", "length")),
    ("complete_and_concise", ("Boil the rice.", "stop"), ("Boil the rice. " * 60, "stop")),
    ("complete_and_concise", ("Boil the rice.", "stop"), ("The cat sat on the mat.", "stop")),
    ("no_repetition", ("Boil the rice for ten minutes.", "stop"), ("Boil it well now. " * 9, "stop")),
    ("max_words=3", ("Boil the rice.", "stop"), ("Boil the rice well.", "stop")),
    ("max_words=3", ("Boil.", "stop"), ("", "stop")),
    ("max_words=3", ("煮米饭。", "stop"), ("把米饭煮好。", "stop")),
    ("no_repetition", ("Варите рис десять минут.", "stop"), ("Варите рис дома сейчас. " * 9, "stop")),
    ("contains=Thank You", ("well, thank you.", "stop"), ("thanks", "stop")),
    (r"regex=^\d+\.", ("1. Boil", "stop"), ("Boil 1.", "stop")),
    ("json_valid", ('```json\n{"a": 1}\n```', "stop"), ('{"a": NaN}', "stop")),
    ("json_valid", ("[1, 2]", "stop"), ("[1, 2", "stop")),
    ("sentiment=vader", ("A wonderful day.", "stop"), ("A horrible day.", "stop")),
    ("sentiment=textblob", ("A wonderful day.", "stop"), ("A horrible day.", "stop")),
    (
        "language=de",
        ("Koche den Reis zehn Minuten lang und gieße ihn dann ab.", "stop"),
        ("Boil the rice, then drain it.", "stop"),
    ),
]


@pytest.mark.parametrize(("rule", "better", "worse"), CASES)
def test_rules_prefer_what_they_say(tmp_path, rule, better, worse):
    judge = open_judge(JudgeConfig(name=f"rule:{rule}"), JudgeContext(tmp_path))
    for policy, reference, winner in ((better, worse, "policy"), (worse, better, "reference")):
        item = Comparison(
            Prompt("p", "How do I boil rice?"), 0, "policy", "reference", Response(*policy), Response(*reference)
        )
        assert {one.winner for one in judge_both_orders(judge, [item])} == {winner}


def test_every_rule_is_tried_above():
    assert {rule.partition("=")[0] for rule, _, _ in CASES} == set(RULES) == set(MARKS)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("brief", "the rules are: rule:complete_and_concise"),
        ("max_words", "needs an argument: rule:max_words=<number>"),
        ("max_words=few", "expected a whole number above 0, got 'few'"),
        ("json_valid=1", "takes no argument"),
        ("regex=(", "not a regular expression"),
        ("language=klingon", "none of the known language codes"),
    ],
)
def test_what_means_nothing_is_refused(rule, problem):
    assert problem in rule_problem(rule)


def test_a_text_without_words_is_a_failure_of_a_rule_that_looks_for_repeated_ones(tmp_path):
    judge = open_judge(JudgeConfig(name="rule:no_repetition"), JudgeContext(tmp_path))
    for text, winner in (("\U0001f600 !" * 60, "failed"), ("", "tie")):
        item = Comparison(Prompt("p", "?"), 0, "policy", "reference", Response(text, "stop"), Response("Yes.", "stop"))
        assert {one.winner for one in judge_both_orders(judge, [item])} == {winner}


def test_a_pattern_that_explodes_is_a_failure_and_no_standstill(tmp_path):
    judge = open_judge(JudgeConfig(name=r"rule:regex=^(a|aa|a*)+b$"), JudgeContext(tmp_path))
    item = Comparison(
        Prompt("p", "?"), 0, "policy", "reference", Response("a" * 60 + "c", "stop"), Response("ab", "stop")
    )
    assert {one.winner for one in judge_both_orders(judge, [item])} <= {"failed", "reference"}
