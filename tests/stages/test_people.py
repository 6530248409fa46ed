"""People's votes through the commands: an evaluation takes them in, judges and exports show them, rm and prune name them.

A double stands in for vLLM's sampling, as in test_every_eval_option.
"""

import json

import polars as pl
import pytest

from pipeline.artifacts.runs import Run
from pipeline.evaluation.votes import Votes, ballots, vote_figures
from pipeline.judges.annotations import read_votes
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here
from tests.evaluation.vote_runs import choice_by


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    where = tmp_path_factory.mktemp("people")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    judges = ["rule:contains=e", "rule:no_repetition", "implicit"]
    config = experiment(where, tiny_model, data, train={"max_steps": 1}, judge=judges, generate={"samples": 2})
    config.write_text(config.read_text().replace("eval_fraction: 0.25", "eval_fraction: 0.5"))
    for stage in ("precompute", "train"):
        refscore_here(where, stage, "--config", config, "--run", "r")
    return where, config


@pytest.fixture
def evaluate(trained, monkeypatch):
    """Evaluates the run, and gives what was said and what engines were started."""
    where, config = trained

    def run(*settings, code=0):
        told = []
        sample_here(monkeypatch, told)
        return refscore_here(where, "eval", "--config", config, "--run", "r", *settings, code=code), told

    return run


@pytest.fixture
def voted(trained, evaluate):
    """The evaluated run, on whose samples two people voted, one of them on less."""
    where, _ = trained
    run = Run(where / "data/runs/r")
    for path in run.votes.glob("*") if run.votes.is_dir() else []:
        path.unlink()
    evaluate()
    asked = ballots(run)
    for voter, number in (("anna", 10), ("ben", 6)):
        votes = Votes(run, voter)
        for ballot in asked[:number]:
            votes.add(ballot, choice_by(lambda text: text.count("e"), ballot))
    Votes(run, "ben").add(asked[6], "skip")
    return where, run, asked


def test_a_second_evaluation_takes_votes_in_and_samples_nothing(voted, evaluate):
    _, run, asked = voted
    before = json.loads(run.eval.read_text())
    assert "people who voted" not in run.report.read_text()
    assert "human" not in before["judges"]
    assert before["people"] is None
    said, told = evaluate()
    assert told == []
    prompts = len({one.prompt_id for one in asked[:10]})
    all_prompts = before["judges"]["rule:contains=e"]["prompts"]
    assert f"judge     human: 16 votes of 2 people on {prompts} of {all_prompts} prompts\n" in said
    results = json.loads(run.eval.read_text())
    human = results["judges"]["human"]
    assert list(results["judges"])[-1] == "human"
    assert (human["prompts"], human["comparisons"], human["failed"]) == (prompts, 10, 0)
    wins = [choice_by(lambda text: text.count("e"), one) for one in asked[:10]]
    scores = {}
    for one, choice in zip(asked, wins, strict=False):
        score = 0.5 if choice == "tie" else float((choice == "first") == one.first_is_model)
        scores.setdefault(one.prompt_id, []).append(score)
    means = [sum(values) / len(values) for values in scores.values()]
    assert human["rate"]["mean"] == pytest.approx(sum(means) / len(means))
    assert human["rate"]["low"] < human["rate"]["mean"] < human["rate"]["high"]
    assert results["people"] == vote_figures(run)["people"]
    assert (results["people"]["voters"], results["people"]["votes"], results["people"]["elsewhere"]) == (2, 16, 0)
    # what automatic judges found is what it was
    for name, rate in before["judges"].items():
        assert results["judges"][name] == rate
    rows = pl.read_parquet(run.judgements).filter(pl.col("judge") == "human")
    assert len(rows) == 10
    assert set(rows["order"]) <= {"policy_first", "reference_first"}
    assert "human" in run.report.read_text()
    assert "| human |" in run.report_markdown.read_text()
    on_pages = f" is what most of 2 people prefer, on {prompts} of {all_prompts} prompts."
    of_people = " is what most of the people who voted prefer"
    assert on_pages in run.report_markdown.read_text()
    assert on_pages in run.report.read_text()
    assert of_people in run.report.read_text()
    assert f"human{on_pages}" in said
    assert evaluate()[0].count("human: 16 votes") == 1


def test_votes_on_other_responses_are_counted_and_count_for_nothing(voted, evaluate):
    _, run, asked = voted
    said, told = evaluate("--set", "generate.seed=5")
    assert told
    results = json.loads(run.eval.read_text())
    now = {(one.prompt, *sorted((one.first, one.second))) for one in ballots(run)}
    same = [(one.prompt, *sorted((one.first, one.second))) in now for one in asked[:10]]
    elsewhere = same.count(False) + same[:6].count(False)
    assert elsewhere > 0
    assert f"{elsewhere} votes are on other responses" in said
    assert results["people"]["elsewhere"] == elsewhere
    assert results["people"]["votes"] == 16 - elsewhere
    assert f"{elsewhere} votes are on other responses, and counted for nothing." in run.report.read_text()
    # the earlier samples come back: so do the votes on them
    evaluate()
    assert json.loads(run.eval.read_text())["people"]["elsewhere"] == 0


def test_a_damaged_vote_stops_an_evaluation_before_anything_is_sampled(voted, evaluate):
    _, run, _ = voted
    with (run.votes / "ben.jsonl").open("a") as file:
        file.write("what?\n")
    said, told = evaluate("--set", "generate.seed=6", code=3)
    assert "ben.jsonl, line 8: not a vote: mend the line, or delete it" in said
    assert told == []


def test_judges_and_exports_have_people_among_them(voted, evaluate):
    where, run, _ = voted
    # before another evaluation too
    said = refscore_here(where, "judges", "--run", "r")
    assert any(line.split()[:2] == ["human", "10"] for line in said.splitlines())
    against = refscore_here(where, "judges", "--run", "r", "--against", run.votes / "anna.jsonl")
    rows = {line.split()[0]: line.split()[1:4] for line in against.partition("Against")[2].splitlines() if line.split()}
    assert rows["rule:contains=e"][0] == "10"
    assert rows["human"][0] == "10"
    evaluate()
    assert refscore_here(where, "judges", "--run", "r") == said
    for form, file in (("alpaca_eval", "annotations_human_policy_reference.json"), ("arena_hard", "policy.jsonl")):
        refscore_here(where, "export", "--run", "r", "--format", form, "--to", where / form)
        (path,) = [path for path in (where / form).rglob(file) if form == "alpaca_eval" or "human" in str(path)]
        matrix = refscore_here(where, "judges", "--annotations", path, "--against", run.votes / "anna.jsonl")
        assert len(read_votes(path)) == 10
        assert " 10 " in matrix.partition("Against")[2]


def test_people_lead_where_no_other_judge_reads_texts(voted, evaluate):
    _, run, _ = voted
    evaluate("--set", "judge=[implicit]")
    assert "human prefers it on" in json.loads(run.eval.read_text())["verdict"]
    # the picture of what was gained against length is of their verdicts
    assert "score minus one half" in run.report.read_text()


def test_a_file_of_what_people_did_not_vote_on_is_still_set_against_the_others(voted):
    where, _, asked = voted
    one = asked[11]
    row = {"instruction": one.prompt, "output_1": one.first, "output_2": one.second, "preference": 1}
    other = write_rows(where / "other.jsonl", [row])
    said = refscore_here(where, "judges", "--run", "r", "--against", other).partition("Against")[2]
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.split()}
    assert rows["rule:contains=e"][:2] == ["1", "1"]
    assert rows["human"] == ["0", "0", *["-"] * 5]


def test_people_are_asked_by_their_file_as_any_judge_of_annotations(voted, evaluate):
    _, run, _ = voted
    said, _ = evaluate("--set", f"judge=['annotations:{run.votes / 'anna.jsonl'}']")
    assert "human: 16 votes" in said


def test_rm_and_prune_say_what_people_voted(voted):
    where, run, _ = voted
    refscore_here(where, "prune", "r", "--apply")
    refscore_here(where, "prune", "--apply")
    assert sorted(path.name for path in run.votes.iterdir()) == ["anna.jsonl", "ben.jsonl"]
    said = refscore_here(where, "rm", "r", code=2)
    for voter in ("anna", "ben"):
        assert f"data/runs/r/votes/{voter}.jsonl: " in said
        assert f"of votes by {voter}, which no command makes again: copy it to keep them" in said
    assert run.directory.is_dir()
