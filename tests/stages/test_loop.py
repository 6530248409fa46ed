"""The loop on a tiny model with real vLLM: two rounds, their report, a sweep on one set of scores, files for other tools."""

import json
import re

import polars as pl
import pytest

import stages.iterate
import stages.sweep
from pipeline.artifacts.grid import grid
from pipeline.artifacts.schemas import JUDGEMENTS, KL, SAMPLES
from pipeline.artifacts.tables import read_table
from pipeline.pairs.splits import prompt_id_of
from tests import forked
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here

pytestmark = pytest.mark.engine

# what a tiny random model writes is short only where it ended by itself
SHORT = r"rule:regex=\A.{1,40}\Z"


@pytest.fixture(scope="session")
def looped(tmp_path_factory, tiny_model):
    """Two rounds on a tiny model, and what they said."""
    where = tmp_path_factory.mktemp("loop")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    config = experiment(
        where,
        tiny_model,
        data,
        train={"max_steps": 2, "learning_rate": 1e-4},
        generate={"max_tokens": 48, "temperature": 1.0, "pair_samples": 8, "pair_judge": SHORT},
        judge=["implicit", SHORT, "rule:no_repetition"],
    )
    said = []

    def step(stage, config, run, overrides):
        """Those that start vLLM in a process of their own, as it is; the others, whose imports take most of their time, here."""
        sets = [part for override in overrides for part in ("--set", override)]
        runs = forked.refscore if stage in ("pairs", "eval") else refscore_here
        said.append(runs(where, stage, "--config", config, "--run", run, *sets))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.iterate, "step", step)
        said.append(refscore_here(where, "iterate", "--config", config, "--run", "it", "--rounds", "2"))
    return where, config, "".join(said)


@pytest.fixture
def rounds(looped):
    return [looped[0] / "data" / "runs" / f"it-r{number}" for number in (1, 2)]


def test_new_pairs_are_of_training_prompts_and_carry_their_provenance(rounds):
    pairs = pl.read_parquet(rounds[0] / "pairs.parquet")
    training = set(pairs.filter(pl.col("split") == "train")["prompt"])
    rows = [json.loads(line) for line in (rounds[0] / "new_pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["prompt"] in training
        made = row["provenance"]
        assert made["judge"] == SHORT
        assert made["run"] == "it-r1"
        assert row["margin"] == pytest.approx(made["chosen_score"] - made["rejected_score"], abs=1e-3) == 1
    held_out = {
        json.loads(line)["prompt"][0]["content"] for line in (rounds[0] / "held_out.jsonl").read_text().splitlines()
    }
    assert held_out == set(pairs.filter(pl.col("split") == "eval")["prompt"])


def test_the_best_sample_met_the_worst(rounds):
    samples = read_table(rounds[0] / "pair_samples.parquet", SAMPLES).to_pylist()
    by_prompt = {}
    for row in samples:
        by_prompt.setdefault(row["prompt"], []).append(row)
    for row in (json.loads(line) for line in (rounds[0] / "new_pairs.jsonl").read_text().splitlines()):
        written = by_prompt[row["prompt"]]
        chosen, rejected = (written[row["provenance"][f"{side}_sample"]] for side in ("chosen", "rejected"))
        assert (chosen["response"], rejected["response"]) == (row["chosen"], row["rejected"])
        assert re.search(SHORT.partition("=")[2], chosen["response"])
        assert not re.search(SHORT.partition("=")[2], rejected["response"])
        assert chosen["finish_reason"] == "stop"


def test_the_second_round_trains_the_firsts_policy_on_its_pairs_with_the_same_held_out_prompts(rounds):
    first, second = (pl.read_parquet(one / "pairs.parquet") for one in rounds)
    new = [json.loads(line)["chosen"] for line in (rounds[0] / "new_pairs.jsonl").read_text().splitlines()]
    assert second.filter(pl.col("split") == "train")["chosen"].to_list() == new
    ids = [
        {prompt_id_of(row) for row in one.filter(pl.col("split") == "eval")["prompt_ids"].to_list()}
        for one in (first, second)
    ]
    assert ids[0] == ids[1]
    config = (rounds[1] / "config.yaml").read_text()
    assert re.search(r"policy:\n  model: .*it-r1/model", config)
    assert (rounds[1] / "gate.json").read_text().count("does not start from the reference") == 1


def test_the_report_compares_the_reference_and_both_rounds(looped, rounds):
    figures = json.loads((rounds[1] / "eval.json").read_text())
    assert set(figures["models"]) == {"policy", "round1", "reference"}
    assert set(figures["ratings"][SHORT]) == {"policy", "round1", "reference"}
    assert {(one["model"], one["baseline"]) for one in figures["others"]} == {
        ("policy", "round1"),
        ("round1", "reference"),
    }
    for model in ("policy", "round1"):
        assert figures["cost"][model]["kl"]["low"] <= figures["cost"][model]["kl"]["mean"]
    page = (rounds[1] / "report.html").read_text()
    for part in ("ratings by rule:regex", "no independent judge"):
        assert part in page
    # a pattern of the user's may look for anything
    assert "uses nothing that the judge that made the pairs does" not in page
    assert "policy is round 2" in looped[2]


def test_kl_is_the_difference_of_both_models_scores_on_the_policys_samples(rounds):
    table = read_table(rounds[1] / "kl.parquet", KL)
    rows = [row for row in table.to_pylist() if row["model"] == "policy"]
    figures = json.loads((rounds[1] / "eval.json").read_text())["cost"]["policy"]
    assert figures["kl"]["mean"] == pytest.approx(sum(row["logp"] - row["ref_logp"] for row in rows) / len(rows))
    assert all(len(row["logps"]) == row["tokens"] == len(row["ref_logps"]) for row in rows)
    # three unbiased estimates of one number
    width = figures["kl"]["high"] - figures["kl"]["low"]
    estimates = {name: one["interval"]["mean"] for name, one in figures["estimates"].items()}
    assert estimates.keys() == {"sampled", "control variate", "exact per position"}
    assert max(abs(figures["kl"]["mean"] - one) for one in estimates.values()) < 3 * width
    assert estimates["control variate"] > 0
    assert estimates["exact per position"] == pytest.approx(sum(sum(row["exact_kl"]) for row in rows) / len(rows))
    assert all(len(row["exact_kl"]) == row["tokens"] for row in rows)


def test_judgements_name_both_models_and_both_orders(rounds):
    table = pl.from_arrow(read_table(rounds[1] / "judgements.parquet", JUDGEMENTS)).filter(
        pl.col("judge") != "implicit"
    )
    per = table.group_by("judge", "model", "baseline", "prompt_id", "sample").agg(pl.col("order").n_unique())
    assert per["order"].unique().to_list() == [2]
    assert set(table["winner"]) <= {"policy", "round1", "reference", "tie"}


def test_the_same_pairs_again_sample_nothing(looped, rounds):
    where, config, _ = looped
    before = (rounds[0] / "new_pairs.jsonl").read_text()
    said = refscore_here(where, "pairs", "--config", config, "--run", "it-r1")
    assert "made before under the same settings" in said
    assert "sampling" not in said
    assert (rounds[0] / "new_pairs.jsonl").read_text() == before


def test_other_tools_files_are_written(looped, rounds):
    where = looped[0]
    said = refscore_here(where, "export", "--run", "it-r2", "--format", "alpaca_eval")
    assert "annotations_rule_no_repetition_policy_reference.json" in said
    said = refscore_here(where, "export", "--run", "it-r2", "--format", "arena_hard", "--to", "arena")
    assert (where / "arena" / "question.jsonl").is_file()
    assert "--format 'csv' is unknown" in refscore_here(where, "export", "--run", "it-r2", "--format", "csv", code=2)


def test_a_sweep_scores_nothing_new_and_draws_its_frontier(looped, monkeypatch):
    """Stages in processes of their own are those of `iterate`, as vLLM's samples are; here both are in this process."""
    where, config, _ = looped
    ran = []

    def step(stage, config, run, overrides):
        sets = [part for override in overrides for part in ("--set", override)]
        ran.append((stage, run, refscore_here(where, stage, "--config", config, "--run", run, *sets)))

    monkeypatch.setattr(stages.sweep, "step", step)
    sample_here(monkeypatch, [])
    compared = refscore_here(
        where, "sweep", "--config", config, "--run", "sw", "--set", "train.beta=0.1,0.5", "--set", "judge=rule:no_repetition",
        "--set", "generate.max_prompts=3",
    )  # fmt: skip
    assert [(stage, run) for stage, run, _ in ran] == [
        (stage, f"sw-beta{beta}") for beta in (0.1, 0.5) for stage in ("precompute", "train", "eval")
    ]
    said = "".join(text for *_, text in ran) + compared
    # the first round scored this data
    assert said.count(" 0 misses") >= 2
    assert said.count("nothing to score") == 2
    assert re.search(r"train\.beta +0\.1 +0\.5", said)
    assert "p, corrected" in said
    page = (where / "data/runs/compare.html").read_text()
    assert page.count("<svg") == 1
    for name in ("sw-beta0.1", "sw-beta0.5", "reference"):
        assert name in page
    assert "sw-beta0.5" in (where / "data/runs/compare.md").read_text()


def test_a_grid_is_every_combination_and_lists_are_no_axes():
    found = grid(["train.beta=0.1,0.3", "data.path=[a, b]", "train.seed=1,2"])
    assert [suffix for suffix, _ in found] == ["beta0.1-seed1", "beta0.1-seed2", "beta0.3-seed1", "beta0.3-seed2"]
    assert found[1][1] == ["data.path=[a, b]", "train.beta=0.1", "train.seed=2"]


def test_a_sweep_of_nothing_is_refused(tmp_path, tiny_model):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(4))
    said = refscore_here(tmp_path, "sweep", "--config", experiment(tmp_path, tiny_model, data), "--run", "x", code=2)
    assert "nothing to sweep" in said
