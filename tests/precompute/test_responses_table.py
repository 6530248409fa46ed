"""responses.parquet: planned, scored, joined, kept and explained as pairs.parquet is; a run has the one or the other."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.artifacts.runs import open_run
from pipeline.artifacts.schemas import DROPPED, RESPONSES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.files import load_config
from pipeline.config.losses import LOSS_FACTS, data_of
from pipeline.config.training import TrainConfig
from pipeline.errors import CheckError, ConfigError, DataError
from pipeline.evaluation.samples import held_out_prompts
from pipeline.pairs import table as pair_table
from pipeline.planning.cautions import cautions
from pipeline.planning.outlook import outlook
from pipeline.precompute.join import dropped_with, joined, rows_left_out
from pipeline.precompute.pairs_file import ensure_pairs, inputs_digest, is_current, table_of, write_pairs
from pipeline.precompute.plan import make_plan
from pipeline.precompute.verify import draw_sample
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.precompute.scoring import lengthened, score_all

KTO = {"data": "responses", "mismatched": True}
BCO = {"data": "responses"}
LISTS = {"data": "lists"}
MARGINS = {"margins": True}


def unpaired(number):
    return [
        {"prompt": f"How do I cook rice number {at // 2}?", "response": f"Boil it {at} times." + " Stir." * (at % 3), "label": at % 3 > 0}
        for at in range(number)
    ]  # fmt: skip


def ranked(number):
    return [
        {"prompt": f"Who is {at}?", "responses": [f"I am {at}.", f"You, {at}, are.", "Nobody."], "scores": [3, 2, 1]}
        for at in range(number)
    ]


@pytest.fixture
def learns(monkeypatch):
    """Makes the default loss one that learns from other data."""

    before = LOSS_FACTS["sigmoid"]

    def change(**facts):
        monkeypatch.setitem(LOSS_FACTS, "sigmoid", replace(before, **facts))

    return change


@pytest.fixture(params=[2048, 4], ids=["one row group", "small row groups"])
def _small_groups(request, monkeypatch):
    monkeypatch.setattr(pair_table, "GROUP", request.param)


def config_of(tmp_path, model, rows, **settings):
    path = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    return load_config(path, [f"data.{name}={value}" for name, value in settings.items()])


class Engine:
    """Scores by the ids alone; of responses for which `infinite` holds, it finds no number."""

    def __init__(self, infinite=lambda request: False):
        self.infinite, self.asked = infinite, []

    def score(self, sequences):
        self.asked += sequences
        return [
            np.full(len(item.response_ids), -np.inf, np.float32)
            if self.infinite(item)
            else -np.asarray(item.response_ids, dtype=np.float32) / 100
            for item in sequences
        ]


def scored(config, engine=None):
    plan = make_plan(config)
    return plan, score_all(plan, engine or Engine())


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize(("facts", "rows", "made"), [(KTO, unpaired, 26), (BCO, unpaired, 13), (LISTS, ranked, 39)])
def test_every_response_is_scored_once_and_stands_with_its_scores(tmp_path, tiny_model, learns, facts, rows, made):
    learns(**facts)
    config = config_of(tmp_path, tiny_model, rows(13))
    plan = make_plan(config)
    assert (plan.sides, len(plan.pairs), len(plan.keys)) == (("response",), made, made)
    requests = [plan.request(at) for at in plan.missing.tolist()]
    assert (plan.missing_tokens, plan.longest_missing) == (sum(map(len, requests)), max(map(len, requests)))
    engine = Engine()
    score_all(plan, engine)
    assert (
        len(engine.asked)
        == plan.sequences
        == len({(tuple(one.prompt_ids), tuple(one.response_ids)) for one in engine.asked})
    )
    table = pa.concat_tables(joined(plan))
    assert table.schema == RESPONSES
    for row in table.to_pylist():
        assert row["ref_response_token_logps"] == pytest.approx([-token / 100 for token in row["response_ids"]])
        assert row["ref_response_logps"] == pytest.approx(-sum(row["response_ids"]) / 100)
    assert len(make_plan(config).missing) == 0
    # no group is torn
    groups = table["group_id"].to_pylist()
    assert sum(one != other for one, other in pairwise(groups)) + 1 == len(set(groups)) == 13
    assert plan.pairs.group_of.tolist() == [list(dict.fromkeys(groups)).index(group) for group in groups]


def test_other_losses_of_the_same_data_score_nothing_again(tmp_path, tiny_model, learns):
    learns(**KTO)
    config = config_of(tmp_path, tiny_model, unpaired(12))
    run = open_run("r")
    plan, _ = scored(config)
    write_pairs(plan, config, run)
    assert is_current(run.responses, config)
    assert read_about(run.responses)["data"] == "responses"
    learns(**BCO)
    assert not is_current(run.responses, config)
    ensure_pairs(config, run)
    assert is_current(run.responses, config)
    assert set(read_table(run.responses, RESPONSES)["kind"].to_pylist()) == {"response"}
    # KTO's rows were scored, and are in the store
    learns(**KTO)
    ensure_pairs(config, run)
    assert set(read_table(run.responses, RESPONSES)["kind"].to_pylist()) == {"response", "mismatched"}


def test_a_run_has_the_table_that_its_loss_reads(tmp_path, tiny_model, learns):
    config = config_of(tmp_path, tiny_model, preference_rows(12))
    run = open_run("r")
    plan, _ = scored(config)
    write_pairs(plan, config, run)
    assert (table_of(run, config), run.scored) == (run.pairs, run.pairs)
    assert "data" not in read_about(run.pairs)
    learns(**BCO)
    assert not is_current(run.pairs, config)
    assert (table_of(run, config), run.scored) == (run.responses, run.pairs)
    # the responses of pairs are the same sequences: nothing is scored for them
    ensure_pairs(config, run)
    assert (run.pairs.exists(), run.scored) == (False, run.responses)
    assert len(read_table(run.responses, RESPONSES)) == 24
    learns()
    assert not is_current(run.responses, config)
    ensure_pairs(config, run)
    assert (run.responses.exists(), run.scored) == (False, run.pairs)


def test_missing_scores_are_told_and_not_made_up(tmp_path, tiny_model, learns):
    learns(**BCO)
    config = config_of(tmp_path, tiny_model, unpaired(8))
    with pytest.raises(ConfigError, match="8 of 8 sequences have no stored score"):
        ensure_pairs(config, open_run("r"))


def test_digests_of_before_stand(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {path: a.jsonl}\n")
    config = load_config(tmp_path / "c.yaml")
    assert inputs_digest(config) == "d2d77aa1b316c57b24eda81b82c0aa3ebd33f9218888a1baa5a1c8023c678510"
    assert inputs_digest(load_config(tmp_path / "c.yaml", ["data.lists=all_pairs"])) != inputs_digest(config)


@pytest.mark.parametrize(
    ("facts", "rows", "spoilt", "gone", "details"),
    [
        (BCO, unpaired, 3, [3], ["response: value 0"]),
        # its own response, and what stands beside others
        (KTO, unpaired, 6, None, ["response: value 0"]),
        (LISTS, ranked, 3, [3], ["response 1, from the best: value 0"]),
    ],
)
def test_what_has_no_finite_score_is_left_out_and_told(
    tmp_path, tiny_model, learns, facts, rows, spoilt, gone, details
):
    learns(**facts)
    config = config_of(tmp_path, tiny_model, rows(8))
    plan = make_plan(config)
    bad = plan.request(spoilt)
    plan, quarantined = scored(
        config, Engine(lambda one: one.response_ids == bad.response_ids and one.prompt_ids == bad.prompt_ids)
    )
    assert len(quarantined) == 1
    left_out = rows_left_out(plan, quarantined)
    if gone is None:
        group = plan.row(spoilt)["group_id"]
        gone = [row for row in range(len(plan.pairs)) if plan.row(row)["group_id"] == group]
        assert len(gone) == 2
    assert sorted(left_out) == gone
    run = open_run("r")
    write_pairs(plan, config, run, quarantined=quarantined)
    kept = read_table(run.responses, RESPONSES)
    assert len(kept) == len(plan.pairs) - len(gone)
    assert kept["ref_response_logps"].null_count == 0
    told = read_table(run.dropped, DROPPED).to_pylist()
    assert [(row["reason"], row["source_row"]) for row in told] == [("not_finite", plan.row(spoilt)["source_row"])]
    assert told[0]["detail"].startswith(details[0])


def test_a_list_with_one_finite_score_is_no_list(tmp_path, tiny_model, learns):
    learns(**LISTS)
    config = config_of(tmp_path, tiny_model, ranked(8))
    first = [make_plan(config).request(row) for row in (0, 1)]
    plan, quarantined = scored(config, Engine(lambda one: one in first))
    assert sorted(rows_left_out(plan, quarantined)) == [0, 1, 2]


def test_a_response_whose_mismatched_one_has_no_score_is_left_out(tmp_path, tiny_model, learns):
    learns(**KTO)
    config = config_of(tmp_path, tiny_model, unpaired(8))
    beside = make_plan(config).request(1)
    plan, quarantined = scored(config, Engine(lambda one: one == beside))
    left_out = rows_left_out(plan, quarantined)
    assert left_out[0].startswith("the response beside it: value 0")
    # both rows of the first prompt have it beside them
    assert sorted(left_out) == [0, 1, 2, 3]
    told = dropped_with(plan, left_out).to_pylist()
    assert [(row["reason"], row["source_row"]) for row in told] == [
        ("not_finite", plan.row(at)["source_row"]) for at in (0, 2)
    ]


def test_scores_of_another_number_of_tokens_are_refused_by_name(tmp_path, tiny_model, learns):
    learns(**BCO)
    plan, _ = scored(config_of(tmp_path, tiny_model, unpaired(8)))
    lengthened(plan, 3, tmp_path / "lengths")
    with pytest.raises(CheckError, match=f"response of group {plan.row(3)['group_id']} has"):
        list(joined(plan))


def test_pairs_and_their_responses_are_drawn_from_one_store(tmp_path, tiny_model, learns):
    """Paired data for kto: what pairs had scored is not scored again, but for the mismatched."""
    config = config_of(tmp_path, tiny_model, preference_rows(6))
    scored(config)
    learns(**KTO)
    plan = make_plan(config)
    assert {plan.row(int(at))["kind"] for at in plan.missing} == {"mismatched"}


def test_the_plan_says_what_there_is(tmp_path, tiny_model, learns):
    learns(**KTO)
    rows = [*unpaired(8), {"prompt": "a", "response": "b", "label": None}]
    config = config_of(tmp_path, tiny_model, rows, eval_fraction=0)
    said = make_plan(config).lines()
    assert "rows      9 read, 8 responses: 8 train, 0 eval" in said
    assert "labels    5 good, 3 bad to train on; beside 8 of them the response to another prompt" in said
    assert "dropped   1 x no_label (first: d.jsonl row 8: label is empty)" in [
        line.replace(f"{tmp_path}/", "") for line in said
    ]
    learns(**LISTS)
    config = config_of(tmp_path, tiny_model, ranked(4), eval_fraction=0)
    assert "lists     12 responses, 3.0 in a list" in make_plan(config).lines()
    learns()
    config = config_of(tmp_path, tiny_model, ranked(4), eval_fraction=0, lists="all_pairs")
    plan = make_plan(config)
    assert "rows      4 read, 12 pairs: 12 train, 0 eval" in plan.lines()
    # three responses of a prompt are three sequences, however many pairs they make
    assert plan.sequences == 12


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (4, 4, None),
        (8, 6, None),
        (8, 2, "8 responses are good and 2 bad, which count 4.00 to 1; KTO's authors (2402.01306) advise 1 to 1.33: train.desirable_weight=0.33"),
        (3, 6, "3 responses are good and 6 bad, which count 0.50 to 1; KTO's authors (2402.01306) advise 1 to 1.33: train.desirable_weight=2.00"),
        (5, 0, "all 5 responses to train on are good"),
    ],
)  # fmt: skip
def test_imbalance_is_told_with_the_way_out(tmp_path, tiny_model, learns, good, bad, said):
    learns(**BCO)
    rows = [{"prompt": f"{at}?", "response": f"r{at}", "label": at < good} for at in range(good + bad)]
    config = config_of(tmp_path, tiny_model, rows, eval_fraction=0)
    found = [one for one in cautions(config, make_plan(config)) if "good" in one]
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)


def test_a_response_that_is_good_and_bad_is_told(tmp_path, tiny_model, learns):
    learns(**KTO)
    rows = unpaired(6)
    config = config_of(tmp_path, tiny_model, [*rows, rows[0] | {"label": not rows[0]["label"]}])
    assert [one for one in cautions(config, make_plan(config)) if one.startswith("1 responses to the same prompt")]


def test_margins_are_written_and_asked_for(tmp_path, tiny_model, learns):
    rows = [row | {"chosen_score": 5, "rejected_score": at} for at, row in enumerate(preference_rows(6))]
    config = config_of(tmp_path, tiny_model, rows)
    run = open_run("r")
    plan, _ = scored(config)
    write_pairs(plan, config, run)
    margins = pl.read_parquet(run.pairs).sort("source_row")["margin"].to_list()
    assert margins == [5, 4, 3, 2, 1, 0]
    assert read_about(run.pairs)["margins"] == 6
    learns(**MARGINS)
    assert is_current(run.pairs, config)
    # a pair of before, when margins were not read
    other = config_of(tmp_path, tiny_model, preference_rows(6))
    learns()
    ensure_pairs(other, run)
    assert is_current(run.pairs, other)
    learns(**MARGINS)
    assert not is_current(run.pairs, other)
    with pytest.raises(DataError, match="6 of 6 pairs do not say how much better chosen is, from which sigmoid learns"):
        ensure_pairs(other, run)


def test_losses_that_learn_from_different_data_are_not_mixed(learns):
    learns(**BCO)
    assert data_of(TrainConfig()) == "responses"
    assert data_of(TrainConfig(objective="reward")) == "pairs"
    with pytest.raises(ValueError, match=r"cannot be mixed \(sigmoid from single responses, ipo from pairs\)"):
        TrainConfig(loss_type=["sigmoid", "ipo"])


def test_commands_read_the_table_or_say_that_they_do_not(tmp_path, tiny_model):
    rows = [*unpaired(16), {"prompt": "a", "label": True}]
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows), train={"loss_type": "kto"})
    run = ("--config", config, "--run", "r")
    said = refscore_here(tmp_path, "precompute", *run, "--plan")
    assert "17 read, 16 responses" in said
    assert not Path("data/runs/r/responses.parquet").exists()
    said = refscore_here(tmp_path, "precompute", *run)
    assert "responses data/runs/r/responses.parquet" in said
    assert "nothing to score" in refscore_here(tmp_path, "precompute", *run)
    assert "ref_response_token_logps (length)" in refscore_here(tmp_path, "show", "data/runs/r/responses.parquet")
    assert "scored" in refscore_here(tmp_path, "list")
    assert "32 hits, 0 misses" in refscore_here(tmp_path, "store", "explain", "--config", config)
    said = refscore_here(tmp_path, "verify", "--run", "r", "--rows", 8)
    assert "8 responses" in said
    assert "the scores are what float32 gives" in said
    assert "learns from responses, and trl takes pairs" in refscore_here(
        tmp_path, "export", "--run", "r", "--format", "trl", code=2
    )
    assert "longest response" in refscore_here(tmp_path, "plan", "--config", config)
    said = refscore_here(tmp_path, "validate", "d.jsonl", "--model", tiny_model)
    assert "17 rows, 16 usable, 1 dropped" in said
    assert "response " in said
    assert "train.loss_type=kto or bco learn from it" in refscore_here(
        tmp_path, "init", "d.jsonl", "--model", tiny_model, code=3
    )
    assert held_out_prompts(Path("data/runs/r/responses.parquet"), None)


def test_what_is_edited_is_explained(tmp_path, tiny_model, learns):
    learns(**BCO)
    rows = unpaired(8)
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows))
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    rows[3]["response"] = "Something else."
    write_rows(tmp_path / "d.jsonl", rows)
    said = refscore_here(tmp_path, "store", "explain", "--config", config)
    assert "7 hits, 1 misses" in said
    assert "1 x the response was edited since run r: row 3 response" in said
    # seen from a run of pairs
    learns()
    write_rows(
        tmp_path / "d.jsonl",
        [{"prompt": rows[3]["prompt"], "chosen": "New.", "rejected": "Newer."}, *preference_rows(4)],
    )
    assert "misses" in refscore_here(tmp_path, "store", "explain", "--config", config)


def test_the_sample_to_verify_and_the_forecast_count_responses(tmp_path, tiny_model, learns):
    learns(**KTO)
    config = config_of(tmp_path, tiny_model, unpaired(12))
    run = open_run("r")
    plan, _ = scored(config)
    write_pairs(plan, config, run)
    sample = draw_sample(run.responses, 5)
    assert (sample.rows, sample.unit, len(sample.requests)) == (5, "responses", 5)
    figures = sample.against([values + 0.5 for values in sample.stored], 0.1)
    assert figures["mean_signed_difference"] == pytest.approx(-0.5)
    rows = read_table(run.responses, RESPONSES).to_pylist()
    trees = [
        len(one["prompt_ids"]) + len(one["response_ids"]) + len(other["response_ids"]) - 2
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert plan.pairs.tree_tokens.tolist() == trees
    longest = [
        len(one["prompt_ids"]) + max(len(one["response_ids"]), len(other["response_ids"]))
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert plan.pairs.sequences_longest.tolist() == longest
    assert outlook(config, plan).longest == max(trees)
