"""Runs side by side: only what can be compared is, corrected for how much was looked at; the frontier's points."""

import json
from dataclasses import replace

import pytest

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import PAIRS, SAMPLES
from pipeline.artifacts.tables import write_table
from pipeline.errors import DataError
from pipeline.evaluation.compare import differences, differing_settings, frontier_points, reached, unlike
from pipeline.evaluation.figures import judgements_table
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.evaluation.results import CONTROL_VARIATE, FORMAT, Cost, Estimate, Results, read_results, write_results
from pipeline.judges.judging import Judgement
from pipeline.report.plots import frontier


def interval(mean):
    return Interval(mean, mean - 0.1, mean + 0.1)


def make(directory, name, scores, kl, opponent="same", reward=0.5, seed=0):
    run = Run(directory / name)
    durable.write_text(run.config, f"train: {{beta: {kl}, seed: {seed}}}\n")
    judgements = [
        Judgement(f"p{n}", 0, judge, "policy", "reference", order, "policy", score)
        for judge in ("rule:a", "rule:b")
        for n, score in enumerate(scores)
        for order in ("policy_first", "reference_first")
    ]
    write_table(run.judgements, judgements_table(judgements))
    write_table(run.samples, SAMPLES.empty_table(), {"keys": {"reference": opponent}})
    rewards = {"rule:a": interval(reward)} if reward else {}
    cost = {
        "policy": Cost(kl=interval(kl), reward=rewards),
        "reference": Cost(reward={"rule:a": interval(0.3)} if reward else {}),
    }
    rate = replace(win_rate(judgements[: 2 * len(scores)]), rate=interval(sum(scores) / len(scores)))
    write_results(run.eval, Results(judges={"rule:a": rate, "implicit": None}, cost=cost))
    return run


def test_two_runs_are_compared_prompt_by_prompt_and_corrected_for_both_judges(tmp_path):
    runs = [make(tmp_path, "one", [0.0] * 8, 1.0), make(tmp_path, "two", [1.0] * 6 + [0.0] * 2, 2.0)]
    found = differences(runs)
    assert [(one.judge, one.first, one.second) for one in found] == [("rule:a", "two", "one"), ("rule:b", "two", "one")]
    assert found[0].paired.difference.mean == 0.75
    # six of six, two-sided: 2 / 2**6; looked at twice
    assert found[0].paired.p == pytest.approx(4 / 64)
    assert found[0].paired.difference.low <= 0


def test_runs_that_differ_in_their_seed_alone_are_one_method(tmp_path):
    low, high = [[0.0] * 6 + [1.0, 0.0]] * 2, [[1.0] * 6 + [1.0, 0.0], [1.0] * 5 + [0.0, 1.0, 0.0]]
    methods = [
        make(tmp_path, f"{name}{seed}", scores, kl, seed=seed)
        for name, kl, both in (("low", 1.0, low), ("high", 2.0, high))
        for seed, scores in enumerate(both)
    ]
    found = differences(methods)
    assert [(one.judge, one.first, one.second, one.seeds) for one in found] == [
        (judge, "high0, high1", "low0, low1", (2, 2)) for judge in ("rule:a", "rule:b")
    ]
    assert found[0].paired.difference.mean == pytest.approx((7 + 6) / 16 - 1 / 8)
    assert found[0].paired.comparisons == 2


def test_one_seed_is_no_method_and_seeds_alone_are_compared_as_models(tmp_path):
    seeds = [make(tmp_path, f"one{seed}", [0.0, 1.0], 1.0, seed=seed) for seed in range(2)]
    other = make(tmp_path, "two", [1.0, 1.0], 2.0)
    assert {(one.first, one.second, one.seeds) for one in differences([*seeds, other])} == {
        ("two", "one0", (1, 1)), ("two", "one1", (1, 1)),
    }  # fmt: skip
    assert {(one.first, one.second) for one in differences(seeds)} == {("one1", "one0")}


def test_win_rates_against_other_opponents_are_not_compared(tmp_path):
    assert differences([make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0, opponent="other")]) == []


def scored_with(run, model):
    write_table(run.pairs, PAIRS.empty_table(), {"model": model})
    return run


def test_runs_of_different_references_are_compared_by_nobody_and_it_is_said(tmp_path):
    one = scored_with(make(tmp_path, "one", [0.0] * 8, 1.0), "a" * 64)
    two = scored_with(make(tmp_path, "two", [1.0] * 8, 2.0), "b" * 64)
    assert differences([one, two]) == []
    assert frontier_points([one, two]) == ([], None)
    (sentence,) = unlike([one, two])
    assert sentence.startswith("trained against different references: one (aaaaaaaaaaaa); two (bbbbbbbbbbbb)")
    same = [scored_with(run, "a" * 64) for run in (one, two)]
    assert unlike(same) == []
    assert len(differences(same)) == 2


def test_other_opponents_and_other_starts_are_said(tmp_path):
    one, two = make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0, opponent="other")
    durable.write_text(two.config, "policy: {model: b}\n")
    durable.write_text(one.config, "policy: {model: a}\n")
    opponents, models = unlike([one, two])
    assert opponents.startswith("the reference wrote other responses: one (same); two (other)")
    assert models.startswith("start from different models: one (a); two (b)")


def began_from(run, policy):
    durable.write_json(run.provenance, {"stages": {"train": {"policy": policy}}})
    return run


def test_where_trainings_began_is_told_by_what_the_model_is_not_by_its_name(tmp_path):
    one, two = make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0)
    for run, name in ((one, "a"), (two, "b")):
        durable.write_text(run.config, f"policy: {{model: {name}}}\n")
        began_from(run, "c" * 64)
    assert unlike([one, two]) == []
    durable.write_text(two.config, "policy: {model: a}\n")
    began_from(two, "d" * 64)
    (sentence,) = unlike([one, two])
    assert sentence.startswith("start from different models: one (cccccccccccc); two (dddddddddddd)")
    # a run of before, or one that is not trained, says its name alone
    began_from(two, None)
    assert unlike([one, two]) == []


def test_an_opponent_that_is_not_known_is_said(tmp_path):
    one, two = make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0, opponent=None)
    assert differences([one, two]) == []
    (sentence,) = unlike([one, two])
    assert sentence.startswith("which responses the reference wrote is not known of two, so that")
    # a run that nobody judged has no opponent to be known
    two.judgements.unlink()
    assert unlike([one, two]) == []


def test_settings_and_figures_stand_side_by_side(tmp_path):
    runs = [make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0)]
    assert differing_settings(runs) == [["train.beta", "1.0", "2.0"]]
    found = {figure.name: figure for figure in reached(runs)}
    kl, rate = found["KL to the reference, nats"], found["win rate, rule:a"]
    assert (kl.values, kl.file, kl.judge) == (["1.00 [0.90, 1.10]", "2.00 [1.90, 2.10]"], "kl.parquet", "")
    # n stands beside every rate
    assert rate.values == ["0.000 [-0.100, 0.100], n = 1", "1.000 [0.900, 1.100], n = 1"]
    assert (rate.file, rate.judge) == ("judgements.parquet", "rule:a")


def test_what_only_one_run_reached_is_a_dash_in_the_other(tmp_path):
    runs = [make(tmp_path, "one", [0.0], 1.0), make(tmp_path, "two", [1.0], 2.0, reward=None)]
    assert {figure.name: figure.values for figure in reached(runs)}["reward at temperature 1, rule:a"][1] == "-"


@pytest.mark.parametrize(("reward", "heights"), [(0.5, [0.5, 0.5, 0.3]), (None, [0.0, 1.0, 0.5])])
def test_the_frontier_has_a_point_a_run_and_the_reference_at_no_cost(tmp_path, reward, heights):
    runs = [make(tmp_path, "one", [0.0], 1.0, reward=reward), make(tmp_path, "two", [1.0], 2.0, reward=reward)]
    points, judge = frontier_points(runs)
    assert judge == "rule:a"
    assert [(one.name, one.cost[0], one.gain[0]) for one in points] == [
        ("one", 1.0, heights[0]), ("two", 2.0, heights[1]), ("reference", 0.0, heights[2]),
    ]  # fmt: skip
    picture = frontier(points, "reward")
    for name in ("one", "two", "reference"):
        assert f">{name}<" in picture


def test_results_are_read_back_and_earlier_ones_too(tmp_path):
    path = make(tmp_path, "one", [1.0, 0.0], 1.0).eval
    results = read_results(path)
    write_results(path, results)
    assert read_results(path) == results
    content = json.loads(path.read_text())
    # the first format: no number, nothing held out, a reference without a KL
    del content["format"], content["cost"]["reference"]["kl"]
    path.write_text(json.dumps(content | {"held_out": {}}))
    assert replace(read_results(path), format=FORMAT) == results
    # the third called the control variate by what it does not always have
    before = content["cost"]["policy"] | {"low_variance": {"mean": 1.0, "low": 0.5, "high": 2.0}}
    path.write_text(json.dumps(content | {"format": 3, "cost": {"policy": before}}))
    assert read_results(path).cost["policy"].estimates == {CONTROL_VARIATE: Estimate(Interval(1.0, 0.5, 2.0))}
    assert read_results(tmp_path / "absent") is None


def test_failures_that_were_counted_by_prompts_are_not_shown_as_comparisons(tmp_path):
    path = make(tmp_path, "one", [1.0, 0.0], 1.0).eval
    content = json.loads(path.read_text())
    judge = next(iter(content["judges"]))
    for made_in, failed, refused in ((2, 0, False), (2, 1, True), (3, 1, False)):
        content["format"], content["judges"][judge]["failed"] = made_in, failed
        path.write_text(json.dumps(content))
        if refused:
            with pytest.raises(DataError, match="refscore eval' again, which samples and asks nothing"):
                read_results(path)
        else:
            assert read_results(path).judges[judge].failed == failed


@pytest.mark.parametrize(("change", "said"), [({"format": 99}, "newer refscore"), ({"judges": {"a": 1}}, "again")])
def test_results_that_cannot_be_read_are_said_to_be(tmp_path, change, said):
    path = make(tmp_path, "one", [1.0, 0.0], 1.0).eval
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        read_results(path)
