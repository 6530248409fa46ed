"""Files for other tools: AlpacaEval's own package computes our plain win rate from them, and what they say is read back."""

import json

import pytest

from pipeline.config.experiment import Config
from pipeline.config.judges import JudgeConfig
from pipeline.errors import DataError
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.exchange.judged_samples import write_alpaca_eval, write_arena_hard
from pipeline.judges.judging import Comparison, Judge, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge


def comparisons():
    return [
        Comparison(
            Prompt(f"p{n}", f"prompt {n}", "a"),
            0,
            "policy",
            "reference",
            Response(f"a{n}" * (n % 4), "stop"),
            Response(f"b{n}", "length"),
        )
        for n in range(40)
    ]


def verdict(duel):
    """Longer wins, with three opinions that depend on the order and one failure."""
    if duel.prompt.prompt_id in ("p1", "p2", "p3"):
        return 0.8
    if duel.prompt.prompt_id == "p4":
        return None
    return 0.5 + 0.1 * (len(duel.first.text) - len(duel.second.text)) / max(
        1, len(duel.first.text), len(duel.second.text)
    )


JUDGE = Judge("rule:longer", lambda duels: [verdict(duel) for duel in duels])


@pytest.fixture
def judged():
    return judge_both_orders(JUDGE, comparisons())


def test_alpaca_evals_own_package_finds_the_same_win_rate(tmp_path, judged):
    from alpaca_eval.metrics import get_winrate

    files = write_alpaca_eval(tmp_path, comparisons(), judged)
    annotations = json.loads((tmp_path / "annotations_rule_longer_policy_reference.json").read_text())
    theirs, ours = get_winrate(annotations), win_rate(judged)
    assert theirs["win_rate"] == pytest.approx(100 * ours.rate.mean, abs=1e-9)
    assert theirs["n_total"] == ours.prompts == 39
    assert (theirs["n_wins"], theirs["n_wins_base"], theirs["n_draws"]) == (ours.wins, ours.losses, ours.ties)
    assert {path.name for path in files} >= {"outputs_policy.json", "outputs_reference.json"}
    assert json.loads(files[0].read_text())[0].keys() == {"instruction", "output", "generator", "dataset"}


def test_annotations_are_a_judge_that_says_the_same_again(tmp_path, judged):
    write_alpaca_eval(tmp_path, comparisons(), judged)
    path = tmp_path / "annotations_rule_longer_policy_reference.json"
    again = win_rate(
        judge_both_orders(open_judge(JudgeConfig(name=f"annotations:{path}"), JudgeContext(tmp_path)), comparisons())
    )
    assert (again.rate, again.failed) == (win_rate(judged).rate, 1)
    # a flip was written as a tie: the file holds one order only
    assert again.flips == 0


def test_arena_hards_games_are_read_back_order_by_order(tmp_path, judged):
    write_arena_hard(tmp_path, comparisons(), judged)
    path = tmp_path / "model_judgment" / "rule_longer_against_reference" / "policy.jsonl"
    row = json.loads(path.read_text().splitlines()[1])
    # the judge of positions: whoever is A wins both games
    assert [game["score"] for game in row["games"]] == ["A>B", "A>B"]
    judge = open_judge(JudgeConfig(name=f"annotations:{path}"), JudgeContext(tmp_path))
    again, ours = win_rate(judge_both_orders(judge, comparisons())), win_rate(judged)
    # labels have no shades: wins, losses, flips and failures are kept
    assert (again.wins, again.ties, again.losses, again.flips, again.failed) == (
        ours.wins,
        ours.ties,
        ours.losses,
        ours.flips,
        ours.failed,
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"a": 1}',
        '[{"instruction": "x"}]',
        '[{"instruction": "x", "output_1": "a", "output_2": "b", "preference": 7}]',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    Config.model_validate({"data": {"path": "x"}, "judge": f"annotations:{tmp_path / 'a.json'}"})
    with pytest.raises(DataError):
        open_judge(JudgeConfig(name=f"annotations:{tmp_path / 'a.json'}"), JudgeContext(tmp_path))
