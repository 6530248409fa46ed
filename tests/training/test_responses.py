"""Training on labelled responses, ranked lists and margins: from the data to the policy, the same however a step is cut."""

import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.artifacts.schemas import RESPONSES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.forward.logps import forward_of
from pipeline.training.inputs.pairs import load_pairs
from pipeline.training.inputs.responses import load_responses
from pipeline.training.objectives.objective import objective_of
from pipeline.training.step import evaluate, train_step
from tests.conftest import experiment, preference_rows, refscore_here, write_rows

TRAIN = {
    "max_steps": 6, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "eval_steps": 3, "save_steps": 2,
    "save_total_limit": 3, "learning_rate": 1e-3, "report_to": [], "precision": "float32", "beta": 0.5,
}  # fmt: skip


def labelled(count=30):
    rows = preference_rows(count)
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, row in enumerate(rows)
    ]


def ranked(count=20):
    return [
        {
            "prompt": row["prompt"],
            "responses": [row["chosen"], row["rejected"], f"{row['chosen']} {row['rejected']}"][: 2 + number % 2],
            "scores": [3.0, 1.0, 2.0][: 2 + number % 2],
        }
        for number, row in enumerate(preference_rows(count))
    ]


DATA = {"kto": labelled, "bco": labelled, "plackett_luce": ranked, "rpo_sq": ranked, "rpo_bwd_kl": ranked}


@pytest.fixture
def place(tmp_path, tiny_model):
    """Runs scored data of a loss under its name; `train` trains it."""

    class Place:
        where = tmp_path

        def run(self, name):
            return tmp_path / "data/runs" / name

        def scored(self, loss, **train):
            data = write_rows(tmp_path / f"{loss}.jsonl", DATA[loss]())
            config = experiment(tmp_path, tiny_model, data, train={**TRAIN, "loss_type": [loss], **train})
            config.rename(tmp_path / f"{loss}.yaml")
            self.said = refscore_here(tmp_path, "precompute", "--config", f"{loss}.yaml", "--run", loss)
            return self.run(loss)

        def train(self, loss, *settings, run=None, code=0):
            sets = [part for setting in settings for part in ("--set", setting)]
            return refscore_here(tmp_path, "train", "--config", f"{loss}.yaml", "--run", run or loss, *sets, code=code)

    return Place()


def table_of(run, loss, split="train"):
    if loss.startswith("rpo"):
        return load_pairs(run / "pairs.parquet", split, margins="the test")
    return load_responses(run / "responses.parquet", split, scored=True, mismatched=loss == "kto")


@pytest.mark.parametrize("loss", DATA)
def test_a_policy_is_trained_from_the_rows_to_the_model(place, loss):
    # distances from a margin run away at the rate that the others take
    run = place.scored(loss, **({"learning_rate": 5e-5} if loss.startswith("rpo") else {}))
    said = place.train(loss)
    assert "gate      passed" in said
    assert "held-out  loss" in said
    metrics = pl.read_parquet(run / "metrics.parquet")
    assert metrics["loss"].drop_nulls()[-1] < metrics["loss"].drop_nulls()[0]
    assert metrics["eval_loss"].drop_nulls()[-1] < metrics["eval_loss"].drop_nulls()[0]
    assert np.isfinite(metrics["eval_rewards/margins"].drop_nulls().to_numpy()).all()
    assert metrics["rewards/margins"].drop_nulls()[-1] > metrics["rewards/margins"].drop_nulls()[0]
    if loss == "kto":
        # before the first step nothing has moved
        assert metrics["kl"][1] == pytest.approx(0, abs=1e-5)
        assert metrics["kl"].drop_nulls().max() >= 0
        assert metrics["eval_kl"].drop_nulls().len() >= 2
    assert "nothing to train" in place.train(loss)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("loss", DATA)
def test_a_step_is_the_same_however_many_forward_passes_it_takes(place, tiny_model, loss, layout):
    examples = table_of(place.scored(loss), loss)
    # an odd number of rows, and labels of both kinds
    rows, found = list(range(7)), []
    for budget in (None, 60, 1):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        train = TrainConfig(loss_type=[loss], tokens_per_batch=budget, beta=0.5)
        if loss == "bco":
            examples.running.total, examples.running.count = 3.0, 7.0
        values = train_step(forward_of(model, layout), examples, rows, train)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        found.append({**values, "norm": float(norm)})
    assert found[0]["norm"] > 1e-3
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=3e-5, rel=1e-4)


def test_kto_and_bco_are_what_their_formulas_say_of_the_stored_numbers(place, tiny_model):
    """From the table's columns and the model's own log-probabilities, without any of the training's code."""
    run = place.scored("kto")
    table = pl.read_parquet(run / "responses.parquet").filter(pl.col("split") == "train")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def rho(row):
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            logps = model(ids).logits.double().log_softmax(-1)[0, :-1]
        own = logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(row["prompt_ids"]) - 1 :].sum()
        return float(own) - row["ref_response_logps"]

    own = [(rho(row), row["label"]) for row in table.filter(pl.col("kind") == "response").to_dicts()][:8]
    others = [rho(row) for row in table.filter(pl.col("kind") == "mismatched").to_dicts()][:8]
    assert {good for _, good in own} == {True, False}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    beta, up, down = 0.5, 1.5, 0.7
    # a policy that has moved towards the mismatched responses: a baseline of 0 would hide how it is made
    examples, shift = table_of(run, "kto"), 1.5 - float(np.mean(others))
    examples.mismatched.ref_sums[:] -= shift
    z0 = 1.5
    kto = [up * (1 - sigmoid(beta * (r - z0))) if good else down * (1 - sigmoid(beta * (z0 - r))) for r, good in own]
    delta = (4.0 + sum(beta * r for r, _ in own)) / (10 + len(own))
    bco = [
        -up * np.log(sigmoid(beta * r - delta)) if good else -down * np.log(sigmoid(delta - beta * r))
        for r, good in own
    ]
    for loss, expected in (("kto", kto), ("bco", bco)):
        train = TrainConfig(loss_type=[loss], beta=beta, desirable_weight=up, undesirable_weight=down)
        examples.running.total, examples.running.count = 4.0, 10.0
        values = train_step(forward_of(model, "tree"), examples, range(8), train)
        assert values["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert values["rewards/chosen"] == pytest.approx(beta * np.mean([r for r, good in own if good]), abs=1e-4)
        assert values["rewards/rejected"] == pytest.approx(beta * np.mean([r for r, good in own if not good]), abs=1e-4)
    assert examples.running.count == 18
    assert examples.running.mean == pytest.approx(delta, abs=1e-5)
    # an evaluation compares with what was seen, and adds nothing
    evaluate(forward_of(model, "tree"), examples, TrainConfig(loss_type=["bco"], beta=beta))
    assert examples.running.count == 18


@pytest.mark.parametrize("loss", ["kto", "bco", "plackett_luce"])
def test_a_resumed_training_is_the_one_that_was_not_interrupted(place, loss):
    run = place.scored(loss)
    whole = place.run("whole")
    whole.mkdir()
    shutil.copy(run / "responses.parquet", whole)
    place.train(loss, run="whole")
    place.train(loss)
    shutil.rmtree(run / "model")
    (run / "provenance.json").unlink()
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert "resuming after step 2" in place.train(loss)
    ours, theirs = (
        dict(AutoModelForCausalLM.from_pretrained(each / "model").named_parameters()) for each in (run, whole)
    )
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_step_of_one_label_has_no_figures_of_the_other(place, tiny_model):
    examples = table_of(place.scored("kto"), "kto")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    good = np.flatnonzero(examples.good).tolist()[:3]
    values = train_step(forward_of(model, "tree"), examples, good, TrainConfig(loss_type=["kto"]))
    assert np.isfinite(values["loss"])
    assert np.isnan(values["rewards/rejected"])
    assert np.isnan(values["rewards/margins"])
    place.train("kto", "train.per_device_train_batch_size=1")
    metrics = pl.read_parquet(place.run("kto") / "metrics.parquet").filter(pl.col("loss").is_not_null())
    assert metrics["rewards/rejected"].null_count() > 0
    assert not metrics["rewards/chosen"].is_nan().any()


def test_held_out_responses_of_one_label_end_no_training(place):
    run = place.scored("kto")
    held_out = write_rows(place.where / "held.jsonl", [{**row, "label": False} for row in labelled(3)])
    settings = (f"data.eval_path={held_out}", "data.eval_fraction=0")
    sets = [part for setting in settings for part in ("--set", setting)]
    refscore_here(place.where, "precompute", "--config", "kto.yaml", "--run", "kto", *sets)
    said = place.train("kto", *settings)
    assert "held-out loss" in said
    assert "nan" not in said
    results = json.loads((run / "provenance.json").read_text())["stages"]["train"]["results"]
    assert (results["eval_rewards/chosen"], results["eval_rewards/margins"]) == (None, None)
    assert np.isfinite(results["eval_loss"])
    assert "nothing to train" in place.train("kto", *settings)


def test_a_list_of_two_is_a_pair(place, tiny_model):
    run = place.scored("plackett_luce")
    lists = table_of(run, "plackett_luce")
    pairs = load_pairs_of(place, run)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    two = [row for row in range(len(lists)) if len(lists.of(row)) == 2]
    of_lists = train_step(forward_of(model, "tree"), lists, two, TrainConfig(loss_type=["plackett_luce"], beta=0.5))
    by_prompt = {tuple(tree.trunk): row for row, tree in enumerate(pairs.trees)}
    same = [by_prompt[tuple(lists.trees[row].trunk)] for row in two]
    of_pairs = train_step(forward_of(model, "tree"), pairs, same, TrainConfig(loss_type=["sigmoid"], beta=0.5))
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"):
        assert of_lists[name] == pytest.approx(of_pairs[name], abs=1e-5)


def load_pairs_of(place, run):
    """The same ranked rows as pairs."""
    settings = ("--set", "train.loss_type=sigmoid")
    refscore_here(place.where, "precompute", "--config", "plackett_luce.yaml", "--run", "as-pairs", *settings)
    return load_pairs(place.run("as-pairs") / "pairs.parquet", "train")


def test_a_reward_model_wants_its_margin(place):
    place.scored("rpo_sq")
    settings = ("train.objective=reward", "train.loss_type=sigmoid")
    place.train("rpo_sq", *settings, run="plain")
    place.train("rpo_sq", *settings, "train.margin_scale=2.0", run="wide")
    plain, wide = (
        pl.read_parquet(place.run(name) / "metrics.parquet")["loss"].drop_nulls()[0] for name in ("plain", "wide")
    )
    # chosen must lead by twice the difference of the scores
    assert wide > plain + 1


def test_margins_that_are_not_there_are_a_sentence(place, tiny_model):
    data = write_rows(place.where / "rpo_sq.jsonl", preference_rows(12))
    config = experiment(place.where, tiny_model, data, train={**TRAIN, "loss_type": ["rpo_sq"]})
    said = refscore_here(place.where, "precompute", "--config", config, "--run", "r", code=3)
    assert "12 of 12 pairs do not say how much better chosen is, from which rpo_sq learns" in said
    # scored for a loss that reads none
    sigmoid = ("--set", "train.loss_type=sigmoid")
    refscore_here(place.where, "precompute", "--config", config, "--run", "r", *sigmoid)
    reward = ("--set", "train.objective=reward", "--set", "train.margin_scale=1")
    said = refscore_here(place.where, "train", "--config", config, "--run", "r", *sigmoid, *reward, code=3)
    assert "12 of 12 pairs do not say how much better chosen is" in said
    with pytest.raises(ConfigError, match="has no margin, which the test reads"):
        load_pairs(place.run("r") / "pairs.parquet", "train", margins="the test")


def test_scores_that_do_not_fit_are_told(place):
    path = place.scored("kto") / "responses.parquet"
    rows = [row for row in read_table(path, RESPONSES).to_pylist() if row["split"] == "train"]
    spoiled = [rows[0] | {"ref_response_logps": rows[0]["ref_response_logps"] - 1}, *rows[1:]]
    write_table(path, pa.Table.from_pylist(spoiled, schema=RESPONSES))
    with pytest.raises(DataError, match="no whole set of ref_response_token_logps"):
        load_responses(path, "train", scored=True)
    lonely = [row for row in rows if row["kind"] == "response"]
    write_table(path, pa.Table.from_pylist(lonely, schema=RESPONSES))
    with pytest.raises(DataError, match="no mismatched response"):
        load_responses(path, "train", scored=True, mismatched=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss_type": ["kto"], "ld_alpha": 0.5}, "ld_alpha is about pairs"),
        ({"loss_type": ["kto", "sigmoid"]}, "cannot be mixed"),
        ({"desirable_weight": 2.0}, "read by loss_type kto, bco only"),
        ({"rpo_eta": 2.0}, "rpo_eta is read by loss_type rpo_sq, rpo_bwd_kl, rpo_fwd_kl only"),
        ({"margin_scale": 1.0}, "objective=reward only"),
        ({"loss_type": ["plackett_luce"], "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        TrainConfig(**settings)


def test_the_objective_follows_the_data():
    assert objective_of(TrainConfig(loss_type=["kto", "bco"])).unit == "response"
    assert objective_of(TrainConfig(loss_type=["plackett_luce"])).unit == "list"
    assert objective_of(TrainConfig(loss_type=["rpo_sq"])).unit == "pair"


def test_the_model_card_says_what_was_learnt_from(place):
    place.scored("kto")
    place.train("kto")
    card = (place.run("kto") / "model/README.md").read_text()
    assert "- kto" in card
    assert "- dpo" not in card
    assert "responses from" in card
    assert "## Held-out responses" in card
    assert "responses per step" in card
