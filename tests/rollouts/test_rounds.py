"""Rounds on samples: what follows what, what the next round starts from, and what is written of all of them."""

import json

import polars as pl
import pytest

import stages.compare
import stages.iterate
import stages.repeat
import stages.sweep
from pipeline.artifacts.runs import Run
from pipeline.evaluation.compare import unlike
from pipeline.report.sections import sections
from pipeline.rollouts.rounds import write_rounds
from tests.conftest import make_tiny_model, refscore_here
from tests.report.evaluations import figures, typed

OBJECTIVE = ("--set", "train.objective=policy_gradient")


def test_every_round_is_rollout_and_train_and_the_next_one_starts_from_its_policy(place, monkeypatch):
    told = []
    monkeypatch.setattr(stages.iterate, "step", lambda stage, _, name, settings: told.append((stage, name, settings)))
    for number in (1, 2):
        (place.run(f"it-r{number}") / "model").mkdir(parents=True)
        (place.run(f"it-r{number}") / "model/config.json").write_text("{}")
    arguments = ["iterate", "--config", place.config, "--run", "it", "--rounds", 3, *OBJECTIVE]
    refscore_here(place.where, *arguments)
    assert [one[:2] for one in told] == [
        *((stage, f"it-r{number}") for number in (1, 2, 3) for stage in ("rollout", "train")),
        ("eval", "it-r3"),
    ]
    given = [[one for one in settings if one != OBJECTIVE[1]] for *_, settings in told]
    assert given[0] == given[1] == []
    assert given[2] == given[3] == ['policy.model="data/runs/it-r1/model"', "policy.revision=null"]
    assert given[4] == ['policy.model="data/runs/it-r2/model"', "policy.revision=null"]
    assert 'generate.models={"round1": "run:it-r1", "round2": "run:it-r2"}' in given[6]
    told.clear()
    refscore_here(place.where, *arguments, "--set", "generate.next_reference=previous")
    assert 'reference.model="data/runs/it-r1/model"' in told[2][2]


def test_a_sweep_of_variants_samples_before_it_trains(place, monkeypatch):
    told = []
    monkeypatch.setattr(stages.sweep, "step", lambda stage, _, name, settings: told.append((stage, name)))
    monkeypatch.setattr(stages.compare, "main", lambda *_: None)
    axis = ("--set", "train.policy_gradient.variant=grpo,rloo")
    refscore_here(place.where, "sweep", "--config", place.config, "--run", "sw", *OBJECTIVE, *axis)
    assert told == [(stage, f"sw-variant{name}") for name in ("grpo", "rloo") for stage in ("rollout", "train", "eval")]
    told.clear()
    refscore_here(place.where, "sweep", "--config", place.config, "--run", "sw", "--set", "train.beta=0.1,0.2")
    assert [stage for stage, _ in told] == ["precompute", "train", "eval"] * 2


def test_a_training_on_samples_is_repeated_with_its_samples(place, monkeypatch):
    monkeypatch.setattr(
        stages.repeat,
        "step",
        lambda stage, path, run, _: refscore_here(place.where, stage, "--config", path, "--run", run),
    )
    place.rollout(OBJECTIVE[1])
    refscore_here(place.where, "train", "--config", place.config, "--run", "r", *OBJECTIVE)
    place.told.clear()
    said = refscore_here(place.where, "repeat", "r")
    assert place.told == []
    assert "losses at most 0 apart" in said
    assert "weights   the same bytes (model/model.safetensors)" in said
    assert place.rows("r-again").equals(place.rows("r"))


def test_the_reference_of_a_training_on_samples_is_what_scored_them_and_not_its_policy(place, tiny_model):
    """As in every later round, whose policy is another model."""
    other = make_tiny_model(place.where / "other", seed=1)
    place.rollout(OBJECTIVE[1], f"policy.model={other}")
    assert "nothing differs" in refscore_here(place.where, "repeat", "r", "--check")
    refscore_here(place.where, "precompute", "--config", place.config, "--run", "pairs")
    runs = [Run(place.run(name)) for name in ("r", "pairs")]
    assert not [sentence for sentence in unlike(runs) if "different references" in sentence]
    place.rollout(OBJECTIVE[1], f"policy.model={other}", f"reference.model={other}", run="s")
    assert [sentence for sentence in unlike([runs[0], Run(place.run("s"))]) if "different references" in sentence]


PPO = ("--set", "train.policy_gradient.variant=ppo")


def test_with_values_every_round_trains_a_critic_that_begins_as_the_last_one(place, monkeypatch):
    told = []
    monkeypatch.setattr(stages.iterate, "step", lambda stage, _, name, settings: told.append((stage, name, settings)))
    for number in (1, 2):
        (place.run(f"it-r{number}") / "model").mkdir(parents=True)
        (place.run(f"it-r{number}") / "model/config.json").write_text("{}")
    arguments = ["iterate", "--config", place.config, "--run", "it", "--rounds", 2, *OBJECTIVE, *PPO]
    refscore_here(place.where, *arguments)
    assert [one[:2] for one in told] == [
        ("rollout", "it-r1"), ("rollout", "it-r1-critic"), ("train", "it-r1-critic"), ("rollout", "it-r1"), ("train", "it-r1"),
        ("rollout", "it-r2"), ("rollout", "it-r2-critic"), ("train", "it-r2-critic"), ("rollout", "it-r2"), ("train", "it-r2"),
        ("eval", "it-r2"),
    ]  # fmt: skip
    given = [[one for one in settings if one not in (OBJECTIVE[1], PPO[1])] for *_, settings in told]
    assert given[0] == given[1] == ["rollout.critic=null"]
    assert given[2] == ["rollout.critic=null", "train.objective=value", "train.learning_rate=1e-05"]
    assert given[3] == given[4] == ['rollout.critic="run:it-r1-critic"']
    policy = ['policy.model="data/runs/it-r1/model"', "policy.revision=null"]
    assert given[5] == given[6] == [*policy, "rollout.critic=null"]
    begins = ['policy.model="data/runs/it-r1-critic/model"', "policy.revision=null"]
    assert given[7] == [*policy, "rollout.critic=null", "train.objective=value", "train.learning_rate=1e-05", *begins]
    assert given[8] == given[9] == [*policy, 'rollout.critic="run:it-r2-critic"']
    # a first one may be given
    told.clear()
    more = ["--set", "rollout.critic=run:rewards", "--set", "policy.lora={r: 2}"]
    more += ["--set", "train.policy_gradient.critic_learning_rate=0.1"]
    refscore_here(place.where, *arguments, *more)
    assert told[2][2][-4:] == [
        "train.learning_rate=0.1", 'policy.model="data/runs/rewards/model"', "policy.revision=null", "policy.lora.merge=true",
    ]  # fmt: skip
    assert told[0][2][-1] == "rollout.critic=null"


@pytest.mark.parametrize("objective", ["value", "reward"])
def test_rounds_of_what_writes_nothing_are_refused(place, objective):
    arguments = ["iterate", "--config", place.config, "--run", "it", "--set", f"train.objective={objective}"]
    assert "writes no responses, so no round can follow" in refscore_here(place.where, *arguments, code=2)


def iterate_here(place, monkeypatch, *more):
    """Both rounds with the double that samples, in this process; what the command said."""

    def step(stage, path, name, settings):
        sets = [part for setting in settings for part in ("--set", setting)]
        refscore_here(place.where, stage, "--config", path, "--run", name, *sets)

    monkeypatch.setattr(stages.iterate, "step", step)
    return refscore_here(
        place.where,
        "iterate",
        "--config",
        place.config,
        "--run",
        "it",
        "--rounds",
        2,
        *OBJECTIVE,
        "--set",
        "judge=rule:contains=dog",
        *more,
    )


@pytest.fixture
def two_rounds(place, monkeypatch):
    return iterate_here(place, monkeypatch)


def test_two_rounds_with_critics_say_what_these_took(place, monkeypatch):
    iterate_here(place, monkeypatch, *PPO, "--set", "train.report_to=[]")
    rounds = json.loads((place.run("it-r2") / "rounds.json").read_text())["rounds"]
    for number, one in enumerate(rounds, start=1):
        steps = pl.read_parquet(place.run(f"it-r{number}-critic") / "metrics.parquet")["step_seconds"].sum()
        values = json.loads((place.run(f"it-r{number}") / "provenance.json").read_text())["stages"]["rollout"]["value"]
        assert one["seconds"]["critic"] == pytest.approx(steps + values["seconds"], abs=0.03)
        assert one["tokens"]["critic"] > values["tokens"] > 0
        assert place.rows(f"it-r{number}")["values"].null_count() == 0
    assert "critic, s" in (place.run("it-r2") / "report.html").read_text()


def test_the_last_run_says_of_every_round_what_it_took_and_reached(place, two_rounds):
    assert "policy is round 2" in two_rounds
    first, second = json.loads((place.run("it-r2") / "rounds.json").read_text())["rounds"]
    assert (first["run"], second["run"]) == ("it-r1", "it-r2")
    for one in (first, second):
        assert min(one["seconds"][part] for part in ("generate", "score", "train")) > 0
        assert min(one["tokens"][part] for part in ("generate", "score", "train")) > 0
        rows = place.rows(one["run"])
        assert one["samples"] == len(rows) == 36
        assert one["mean_reward"] == pytest.approx(rows["reward"].mean())
        assert one["kl_before"] == pytest.approx((rows["logp"] - rows["ref_logp"]).mean())
    # the first round's samples are the reference's own
    assert first["kl_before"] == 0
    assert second["kl_before"] != 0
    costs = json.loads((place.run("it-r2") / "eval.json").read_text())["cost"]
    assert [first["kl"], second["kl"]] == [costs[name]["kl"]["mean"] for name in ("round1", "policy")]
    page = (place.run("it-r2") / "report.html").read_text()
    assert "mean reward of the samples" in page
    metrics = pl.read_parquet(place.run("it-r2") / "metrics.parquet")
    assert second["seconds"]["train"] == pytest.approx(metrics["step_seconds"].sum(), abs=0.02)


def test_the_table_of_rounds_stands_in_the_report_of_a_run_that_has_them(place, monkeypatch):
    monkeypatch.chdir(place.where)
    place.rollout()
    found = typed(figures(0.7, 0.6, 0.8))
    assert "Rounds" not in [section.title for section in sections(found, "r")]
    write_rounds([Run(place.run()), Run(place.run())])
    (table,) = [section for section in sections(found, "r") if section.title == "Rounds"]
    assert [str(row[0]) for row in table.rows] == ["1", "2"]
    assert all(len(row) == len(table.head) for row in table.rows)
    assert str(table.rows[0][3]) == f"{place.provenance()['mean_reward']:.4f}"
    # neither was trained or evaluated
    assert [str(table.rows[0][at]) for at in (5, 9)] == ["-", "0.0"]
