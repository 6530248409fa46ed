"""What people's votes say, against hand values: the majority, what is absent, agreement with judges, topics, trust."""

import json
from dataclasses import replace

import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.files import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.figures import rated, win_figures, worst_first
from pipeline.evaluation.rates.agreement import agreement
from pipeline.evaluation.rates.statistics import wilson
from pipeline.evaluation.votes import Votes, ballots, vote_figures
from pipeline.evaluation.votes.people import judged_by_people
from pipeline.evaluation.votes.record import Given
from pipeline.evaluation.votes.voices import voices_of
from pipeline.judges.judging import Comparison, Judgement, Prompt, Response
from tests.evaluation.vote_runs import choice_by, judge_by, run_of

PROMPTS = ["p0", "p1", "p2", "p3"]


def items(prompts=PROMPTS, samples=1, model="policy", baseline="reference"):
    return [
        Comparison(Prompt(name, name), n, model, baseline, Response(f"{model} {n}", "stop"), Response(baseline, "stop"))
        for name in prompts
        for n in range(samples)
    ]


def given(item, choice, *, model_first=True, note=""):
    sides = (item.response.text, item.against.text)
    return Given(*item.key, item.prompt.text, *(sides if model_first else sides[::-1]), model_first, choice, note)


def test_the_majority_of_voters_counts_whichever_side_they_saw_it_on():
    asked = items()
    said = {
        # p0: two of three for the policy; p1: one each; p2: a tie against a win; p3: a skip alone
        "anna": [given(asked[0], "first", note="kinder\ud83d"), given(asked[1], "second"), given(asked[2], "tie")],
        "ben": [given(asked[0], "second", model_first=False), given(asked[1], "second", model_first=False)],
        "eva": [given(asked[0], "first", model_first=False, note="too long"), given(asked[2], "first"), given(asked[3], "skip")],
    }  # fmt: skip
    judgements, people = judged_by_people(said, asked)
    assert [(one.prompt_id, one.score, one.winner, one.order) for one in judgements] == [
        ("p0", 1.0, "policy", "reference_first"),
        ("p1", 0.5, "tie", "policy_first"),
        ("p2", 1.0, "policy", "policy_first"),
    ]
    assert [one.words for one in judgements] == ["kinder?\ntoo long", None, None]
    assert (people.voters, people.votes, people.prompts, people.of_prompts) == (3, 7, 3, 4)
    assert (people.comparisons, people.of_comparisons, people.elsewhere) == (3, 4, 0)


def test_one_vote_on_texts_that_stand_twice_is_one_vote():
    asked = [replace(item, response=Response("once more", "stop")) for item in items(["p"], samples=2)]
    judgements, people = judged_by_people({"anna": [given(asked[0], "first")]}, asked)
    assert [(one.sample, one.score) for one in judgements] == [(0, 1.0), (1, 1.0)]
    assert (people.votes, people.comparisons) == (1, 2)
    # where both were voted on, each counts for its own
    both = {"anna": [given(asked[0], "first"), given(asked[1], "second")]}
    assert [one.score for one in judged_by_people(both, asked)[0]] == [1.0, 0.0]


def test_what_nobody_voted_on_is_absent_and_no_failure():
    asked = items()
    judged, _ = judged_by_people({"anna": [given(asked[0], "first"), given(asked[1], "skip")]}, asked)
    rate = win_figures(judged, asked).judges["human"]
    assert (rate.prompts, rate.comparisons, rate.wins, rate.ties, rate.failed, rate.flips) == (1, 1, 1, 0, 0, 0)
    assert (rate.worst, rate.best, rate.rate.mean) == (1.0, 1.0, 1.0)
    # one order alone says nothing of a preference for a place
    assert rate.first_wins is None


def test_the_length_of_what_was_voted_on_counts_and_of_nothing_else():
    prompts = [f"p{n}" for n in range(30)]

    def response(number, sample):
        # the first sample is longer by turns, the second always by far
        return "x" * (5 + 4 * (number % 3) if sample == 0 else 500)

    asked = [
        replace(item, response=Response(response(int(item.prompt.prompt_id[1:]), item.sample), "stop"))
        for item in items(prompts, samples=2)
    ]
    said = {"anna": [given(item, "first" if number % 4 else "second") for number, item in enumerate(asked[::2])]}
    judged, _ = judged_by_people(said, asked)
    alone = win_figures(judged, asked[::2]).judges["human"]
    assert alone.length_controlled is not None
    assert win_figures(judged, asked).judges["human"].length_controlled == alone.length_controlled


def test_identical_responses_are_no_ties_of_people():
    asked = [replace(items()[0], against=items()[0].response)]
    assert judged_by_people({"anna": [given(asked[0], "tie")]}, asked)[0] == []


def test_a_vote_of_people_weighs_as_much_as_another_judge_where_the_worst_stands_first():
    asked = items(["p"])
    both = [
        Judgement("p", 0, "rule", "policy", "reference", f"{side}_first", "policy", 1.0)
        for side in ("policy", "reference")
    ]
    human, _ = judged_by_people({"anna": [given(asked[0], "second")]}, asked)
    assert worst_first(asked, [*both, *human])[0].difference == 0.0


def test_models_that_people_did_not_tie_to_the_reference_are_not_rated():
    def groups(*pairs):
        return {
            (model, baseline, "human"): [Judgement("p", 0, "human", model, baseline, f"{model}_first", model, 1.0)]
            for model, baseline in pairs
        }

    assert rated(groups(("policy", "reference"), ("a", "b"))) == {}
    tied = rated(groups(("policy", "reference"), ("a", "policy")))
    assert tied["human"].keys() == {"policy", "reference", "a"}


def long_ones(text):
    return len(text)


@pytest.fixture
def run(tmp_path):
    """60 prompts of two topics: the policy says `good` in every third, and is longer there and in every fifth."""
    texts = [
        (
            f"{n} {'good' if n % 3 == 0 else 'plain'}{'' if n % 3 and n % 5 else ' and much longer'}",
            f"{n} the reference",
        )
        for n in range(60)
    ]
    same = [*texts, ("same", "same ")]
    judges = [
        judge_by("longer", long_ones),
        judge_by("good", lambda text: "good" in text),
        judge_by("none", lambda _: 0),
    ]
    return run_of(tmp_path / "data/runs/r", same, ("cats", "dogs"), judges)


def vote(run, voter, likes, number=None):
    asked, votes = ballots(run), Votes(run, voter)
    for ballot in asked[:number]:
        votes.add(ballot, choice_by(likes, ballot), seconds=2)
    return asked


def test_the_judge_that_votes_as_people_do_deserves_most_trust(run):
    vote(run, "anna", lambda text: "good" in text)
    found = vote_figures(run)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["prompts"], found["comparisons"]) == (61, 60)
    assert found["people"]["of_prompts"] == 61
    assert [row["judge"] for row in found["judges"]] == ["good", "longer", "none"]
    good, longer, none = found["judges"]
    assert (good["same"]["mean"], good["kappa"]["mean"], good["comparisons"]) == (1.0, 1.0, 60)
    assert (good["same"]["n"], longer["kappa"]["n"], good["kappa"]["n"], good["topics"]["cats"]["kappa"]["n"]) == (
        60,
        60,
        60,
        30,
    )
    # always a tie against 20 wins and 40 ties: nothing beyond chance
    assert none["same"]["mean"] == pytest.approx(40 / 60)
    assert none["kappa"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert none["decided"] is None
    # cats are the even prompts
    assert {topic: row["comparisons"] for topic, row in good["topics"].items()} == {"cats": 30, "dogs": 30}
    assert found["human"]["rate"]["mean"] == pytest.approx((20 + 40 / 2) / 60)
    assert (found["human"]["wins"], found["human"]["ties"], found["human"]["losses"]) == (20, 40, 0)
    # longer wins 28 times of 60, 20 times where people do; else it loses where they see a tie
    chance = 20 / 60 * 28 / 60
    assert longer["kappa"]["mean"] == pytest.approx((20 / 60 - chance) / (1 - chance))
    assert 0 < longer["kappa"]["low"] < longer["kappa"]["mean"] < longer["kappa"]["high"]


def test_trust_goes_by_the_lower_end_and_not_by_the_mean(run):
    """A judge that agrees on few comparisons is surpassed by one that agrees a little less on many."""
    vote(run, "anna", lambda text: "good" in text)
    rows = pl.read_parquet(run.judgements)
    seen = rows.filter(pl.col("judge") == "good")["prompt_id"].unique(maintain_order=True).to_list()
    few = rows.filter((pl.col("judge") == "good") & pl.col("prompt_id").is_in(seen[:4])).with_columns(
        judge=pl.lit("few")
    )
    write_table(run.judgements, pl.concat([rows, few]).to_arrow().cast(JUDGEMENTS))
    found = {row["judge"]: row for row in vote_figures(run)["judges"]}
    assert found["few"]["comparisons"] == 4
    assert found["few"]["kappa"]["mean"] == found["good"]["kappa"]["mean"] == 1.0
    assert list(found).index("few") > list(found).index("good")


def test_each_voter_and_every_two_of_them(run):
    asked = vote(run, "anna", long_ones, 30)
    vote(run, "ben", lambda text: -len(text), 10)
    Votes(run, "ben").add(asked[50], "skip", note="both are bad")
    found = vote_figures(run)
    anna, ben = found["voters"]
    firsts = sum(choice_by(long_ones, one) == "first" for one in asked[:30])
    assert (anna["voter"], anna["votes"], anna["ties"], anna["skips"], anna["seconds"]) == ("anna", 30, 0, 0, 2.0)
    assert anna["first_share"]["mean"] == wilson(firsts, 30).mean
    assert anna["wins"] + anna["losses"] == 30
    assert anna["wins"] == sum((len(one.first) > len(one.second)) == one.first_is_model for one in asked[:30])
    assert (ben["voter"], ben["votes"], ben["skips"], ben["notes"]) == ("ben", 10, 1, 1)
    (both,) = found["between"]
    assert (both["first"], both["second"], both["comparisons"], both["same"]["mean"]) == ("anna", "ben", 10, 0.0)
    assert both["kappa"]["mean"] < 0
    # they contradict each other on ten, which are ties of the majority
    assert found["human"]["ties"] == 10


def test_before_the_first_vote_and_the_first_judge_there_are_no_figures(run):
    found = vote_figures(run)
    assert (found["people"], found["human"], found["voters"], found["judges"], found["between"]) == (
        None,
        None,
        [],
        [],
        [],
    )
    vote(run, "anna", long_ones, 3)
    run.judgements.unlink()
    found = vote_figures(run)
    assert found["human"]["prompts"] == 3
    assert found["judges"] == []


def test_votes_on_other_models_are_not_those_on_responses_that_are_gone(run):
    asked = vote(run, "anna", long_ones, 5)
    others = replace(asked[7], model="earlier", first="earlier one", second="earlier two")
    for voter in ("anna", "ben"):
        Votes(run, voter).add(others, "first")
    found = vote_figures(run)
    assert [row["voter"] for row in found["voters"]] == ["anna"]
    assert (found["people"]["elsewhere"], found["people"]["votes"]) == (0, 5)
    assert found["voters"][0]["votes"] == 5


def test_votes_on_responses_that_are_gone_are_counted_and_used_for_nothing(run):
    asked = vote(run, "anna", long_ones, 10)
    gone = {one.prompt_id for one in asked[:4]}
    rows = read_table(run.samples, SAMPLES).to_pylist()
    for row in rows:
        if row["prompt_id"] in gone and row["model"] == "policy":
            row["response"] += " anew"
    write_table(run.samples, pa.Table.from_pylist(rows, schema=SAMPLES))
    found = vote_figures(run)
    assert found["people"]["elsewhere"] == 4
    assert found["human"]["comparisons"] == 6
    assert {row["judge"]: row["comparisons"] for row in found["judges"]}["longer"] == 6


def test_the_figures_are_those_that_refscore_judges_compares(run):
    """The page reads only what was voted on; the command reads all: the same agreement."""
    vote(run, "anna", long_ones, 40)
    said = {one.name: one for one in voices_of(run)}
    assert list(said) == ["longer", "good", "none", "human"]
    for row in vote_figures(run)["judges"]:
        found = agreement(said["human"], said[row["judge"]])
        assert row["comparisons"] == found.comparisons
        assert row["same"]["mean"] == found.same.mean


def test_a_damaged_file_of_votes_is_named(run):
    vote(run, "anna", long_ones, 3)
    (run.directory / "votes" / "ben.jsonl").write_text("what?\n")
    with pytest.raises(DataError, match=r"ben.jsonl, line 1"):
        vote_figures(run)


def test_no_other_judge_may_be_called_human(tmp_path):
    with pytest.raises(ConfigError, match="'human' is no label for it: that name is what people voted"):
        load_config("demo", ["judge=[{name: 'rule:no_repetition', label: human}]"])
    with pytest.raises(ConfigError, match="'human' is unknown"):
        load_config("demo", ["judge=[human]"])
