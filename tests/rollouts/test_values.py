"""A critic from stored samples, its values beside them, and a policy by generalised advantages: step by step, one model at a time."""

import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import pipeline.rollouts.critics
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import TrainConfig
from pipeline.forward.logps import forward_of
from pipeline.forward.trees import Tree
from pipeline.forward.values import values_of
from pipeline.training.inputs.rollouts import load_rollouts
from pipeline.training.objectives.objective import objective_of
from pipeline.training.step import train_step
from tests.conftest import (
    experiment,
    make_tiny_model,
    make_tiny_tokenizer,
    preference_rows,
    refscore_here,
    write_rows,
)
from tests.rollouts.conftest import SETTINGS, Place
from tests.rollouts.test_training import TRAIN, copied, metrics

CRITIC = ("train.objective=value", "train.learning_rate=0.01", "train.max_steps=40", "train.save_steps=0")
PPO = ("train.policy_gradient.variant=ppo", "rollout.critic=run:critic")


def train(place, *settings, run="r", code=0):
    sets = [part for setting in (*TRAIN, *settings) for part in ("--set", setting)]
    return refscore_here(place.where, "train", "--config", place.config, "--run", run, *sets, code=code)


def planted(table):
    """Samples that begin with one of some tokens are good, whatever follows: to be seen from the second token's state on."""
    rewards = [2.0 if ids[0] % 2 else -1.0 for ids in table["response_ids"].to_pylist()]
    return table.set_column(table.schema.get_field_index("reward"), "reward", pa.array(rewards))


def rewrite(place, change, run="r"):
    path = place.run(run) / "rollouts.parquet"
    about = read_about(path)
    write_table(path, change(read_table(path, ROLLOUTS)), about)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """Samples with a planted reward in run r, and in run critic a critic of them; and what its training said."""
    where = tmp_path_factory.mktemp("critic")
    data = write_rows(where / "preferences.jsonl", preference_rows(14))
    judge = ["rule:contains=dog", "rule:no_repetition"]
    config = experiment(where, tiny_model, data, rollout=SETTINGS, generate={"max_tokens": 12}, judge=judge)
    with pytest.MonkeyPatch.context() as patch:
        place = Place(where, config, patch)
        place.rollout()
        rewrite(place, planted)
        copied(place, "critic")
        return place, train(place, *CRITIC, run="critic")


@pytest.fixture
def critic(trained, tmp_path, monkeypatch):
    """A place of its own with all that is in `trained`."""
    made, said = trained
    shutil.copytree(made.where / "data", tmp_path / "data")
    place = Place(tmp_path, made.config, monkeypatch)
    place.said = said
    return place


def test_a_critic_learns_a_planted_reward_and_is_saved_as_a_reward_model_is(critic):
    assert "explained" in critic.said
    assert "gate      does not apply: nothing is compared with the reference" in critic.said
    assert "steps of 4 prompts" in critic.said
    found = metrics(critic, "critic")
    # it begins by expecting nothing
    assert found["value/mean"][0] == 0
    assert found["loss"][-5:].mean() < 0.5 * found["loss"][:5].mean()
    assert found["value/explained_variance"][-5:].mean() > 0.3
    assert found["ratio/mean"].null_count() == found["rewards/margins"].null_count() == len(found)
    model = AutoModelForSequenceClassification.from_pretrained(critic.run("critic") / "model").eval()
    assert model.config.num_labels == 1
    rows = critic.rows().to_dicts()
    read = values_of(model, "tree", torch.float32)
    with torch.no_grad():
        values = [read([Tree(row["prompt_ids"], (row["response_ids"],))])[0][0].numpy() for row in rows]
    means = {sign: np.mean([own[1:].mean() for own, row in zip(values, rows, strict=True)
                            if row["reward"] == sign and len(own) > 1]) for sign in (2.0, -1.0)}  # fmt: skip
    assert means[2.0] > means[-1.0] + 1
    card = (critic.run("critic") / "model/README.md").read_text()
    assert "trained as a value model on 12 prompts" in card
    assert "value-model" in card
    # it writes no responses
    said = refscore_here(critic.where, "eval", "--config", critic.config, "--run", "critic", "--set", CRITIC[0], code=2)
    assert "use it as a critic, rollout.critic=run:critic" in said


def test_values_stand_beside_every_sample_and_are_made_once(critic, monkeypatch):
    rewards = critic.rows()["reward"]
    said = critic.rollout("rollout.critic=run:critic")
    assert "loading the critic run:critic for 36 samples" in said
    assert (critic.told, critic.scored) == ([], [])
    rows = critic.rows().to_dicts()
    # the judge's rewards are there again
    assert critic.rows()["reward"].to_list() != rewards.to_list()
    model = AutoModelForSequenceClassification.from_pretrained(critic.run("critic") / "model").eval()
    for row in rows[::5]:
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0]
            expected = model.score(states)[len(row["prompt_ids"]) - 1 : -1, 0]
        assert row["values"] == pytest.approx(expected.tolist(), abs=1e-4)
    costs = critic.provenance()["value"]
    assert costs["tokens"] == sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert costs["seconds"] > 0
    monkeypatch.setattr(pipeline.rollouts.critics, "CriticPass", None)
    assert "all made before; no model is loaded" in critic.rollout("rollout.critic=run:critic")
    # another run takes them over
    critic.rollout("rollout.critic=run:critic", run="third")
    assert critic.rows("third")["values"].to_list() == critic.rows()["values"].to_list()
    # and without a critic there are none
    critic.rollout()
    assert critic.rows()["values"].null_count() == 36


def test_another_critic_makes_new_values_and_nothing_else(critic):
    critic.rollout("rollout.critic=run:critic")
    before = critic.rows()
    other = critic.where / "other"
    shutil.copytree(critic.run("critic") / "model", other)
    model = AutoModelForSequenceClassification.from_pretrained(other)
    model.score.weight.data *= 2
    model.save_pretrained(other)
    said = critic.rollout(f"rollout.critic={other}")
    assert f"loading the critic {other}" in said
    assert (critic.told, critic.scored) == ([], [])
    for old, new in zip(before["values"], critic.rows()["values"], strict=True):
        assert new.to_list() == pytest.approx([2 * value for value in old], abs=1e-4)
    assert critic.rows().drop("values").equals(before.drop("values"))


def test_a_shard_of_values_that_is_damaged_is_made_again(critic):
    critic.rollout("rollout.critic=run:critic")
    before = critic.rows()
    (shard, *_) = sorted((critic.run() / "rollouts").glob("values-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-40])
    assert "for 12 samples" in critic.rollout("rollout.critic=run:critic")
    assert critic.rows().equals(before)


def test_values_that_are_no_numbers_are_a_sentence(critic):
    directory = critic.run("critic") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.score.weight.data[0, 0] = float("nan")
    model.save_pretrained(directory)
    assert "gives values that are not finite" in critic.rollout("rollout.critic=run:critic", code=4)


# --- a policy by generalised advantages


@pytest.fixture
def valued(critic):
    critic.rollout("rollout.critic=run:critic")
    rewrite(critic, planted)
    return critic


def test_a_policy_learns_by_a_critics_values(valued):
    settings = (*PPO, "train.policy_gradient.kl_coef=0.05", "train.max_steps=20")
    said = train(valued, *settings)
    assert "gate      passed" in said
    found = metrics(valued)
    assert found["ratio/mean"][0] == pytest.approx(1, abs=1e-4)
    assert found["kl"].null_count() == 0
    assert found["kl/behaviour"][-1] > 0
    # the token that decides the reward became likelier where that is good, and less so where it is bad
    rows = valued.rows().to_dicts()
    model = AutoModelForCausalLM.from_pretrained(valued.run() / "model").eval()
    with torch.no_grad():
        read = forward_of(model, "tree")
        gained = [
            float(read([Tree(row["prompt_ids"], (row["response_ids"],))])[0][0][0]) - row["logps"][0] for row in rows
        ]
    means = {
        reward: np.mean([gain for gain, row in zip(gained, rows, strict=True) if row["reward"] == reward])
        for reward in (2.0, -1.0)
    }
    assert means[2.0] > 0 > means[-1.0]
    card = (valued.run() / "model/README.md").read_text()
    assert "ppo" in card
    assert "nothing to train" in train(valued, *settings)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("objective", ["policy_gradient", "value"])
def test_a_step_is_the_same_however_many_forward_passes_it_takes(valued, tiny_model, layout, objective):
    settings = PolicyGradientConfig(variant="ppo", kl_coef=0.1)
    rollouts = load_rollouts(valued.run() / "rollouts.parquet", settings, for_critic=objective == "value")
    found = []
    for budget in (None, 80, 1):
        directory = tiny_model if objective == "policy_gradient" else valued.run("critic") / "model"
        config = TrainConfig(objective=objective, policy_gradient=settings, tokens_per_batch=budget)
        kind = objective_of(config)
        if objective == "value":
            model = AutoModelForSequenceClassification.from_pretrained(directory)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory)
        values = train_step(kind.forward_of(model, layout, torch.float32), rollouts, range(5), config)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        found.append({**values, "norm": float(norm)})
    assert found[0]["norm"] > 1e-3
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=2e-5, rel=1e-4)


def test_without_values_the_way_out_is_said(critic):
    said = train(critic, PPO[0], code=2)
    assert "reads a critic's values: train one on these samples (train.objective=value" in said
    said = train(critic, *PPO, code=2)
    assert "has no values of a critic: run 'refscore rollout' with the same configuration and run again" in said


def test_values_of_a_critic_that_has_changed_are_refused_and_one_that_is_gone_is_taken_to_be_unchanged(valued):
    train(valued, *PPO, "train.max_steps=1")
    directory = valued.run("critic") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    model.score.weight.data *= 2
    model.save_pretrained(directory)
    said = train(valued, *PPO, "train.max_steps=1", "train.seed=1", code=2)
    assert "has values of another critic than rollout.critic 'run:critic' is now" in said
    shutil.rmtree(directory)
    assert "nothing to train" in train(valued, *PPO, "train.max_steps=1")


def test_what_reads_no_values_trains_on_a_file_that_has_them_and_a_critic_too(valued):
    copied(valued, "plain")
    assert "gate      passed" in train(valued, run="plain")
    copied(valued, "again")
    # a critic may begin as the last one, which is another model than the one that wrote the samples
    begins = f"policy.model={valued.run('critic') / 'model'}"
    train(valued, *CRITIC, begins, "train.max_steps=2", run="again")
    assert metrics(valued, "again")["loss"][0] < metrics(valued, "critic")["loss"][0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("run:nothing", "data/runs/nothing/model does not exist: run 'refscore train' with train.objective=value"),
        ("policy", "expected a sequence classifier with one label, got LlamaForCausalLM"),
        ("words", "has another vocabulary than reference.model"),
        ("short", "reads 16 tokens, and prompts with their responses have up to"),
    ],
)
def test_a_critic_that_cannot_be_is_said_before_anything_is_sampled(critic, tiny_model, name, says):
    directory = critic.where / name
    if name == "policy":
        make_tiny_model(directory)
    elif ":" not in name:
        shutil.copytree(critic.run("critic") / "model", directory)
        if name == "words":
            tokenizer = make_tiny_tokenizer()
            tokenizer.add_tokens(["ZZZ"])
            tokenizer.save_pretrained(directory)
        else:
            content = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 16}))
    said = critic.rollout(f"rollout.critic={name if ':' in name else directory}", "rollout.seed=9", code=2)
    assert says in said
    assert critic.told == []


def test_one_sample_of_each_prompt_is_enough_for_a_critic(place):
    place.rollout("rollout.samples=1", "rollout.judge=rule:no_repetition")
    assert len(place.rows()) == 12
    copied(place, "critic")
    settings = ("rollout.samples=1", "rollout.judge=rule:no_repetition")
    train(place, *CRITIC, *settings, "train.max_steps=2", run="critic")
    place.rollout(*settings, "rollout.critic=run:critic")
    assert "gate      passed" in train(place, *PPO, *settings)
    assert pl.read_parquet(place.run() / "metrics.parquet")["reward_std"].null_count() == 6
