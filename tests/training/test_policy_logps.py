"""What the policy gave every pair is what a plain forward pass gives then, and an interruption changes no byte of it."""

import dataclasses
import itertools
import logging
import shutil
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.training.loop
import pipeline.training.train
from pipeline.artifacts.runs import open_run
from pipeline.artifacts.schemas import POLICY_LOGPS
from pipeline.artifacts.tables import read_table
from pipeline.config.files import load_config
from pipeline.errors import CheckError
from pipeline.forward.routes import Route
from pipeline.forward.trees import Tree
from pipeline.training.checkpoint import load_policy_logps, newest_checkpoint
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.records.policy_logps import PolicyLogps
from pipeline.training.schedule import learning_rate, pairs_of_step
from tests.conftest import experiment, preference_rows, refscore_here, write_rows

WAYS = {
    "packed": Route("packed"),
    "packed up to a limit": Route("packed", "positions", 40),
    "padded": Route("padded", "its layers"),
    "alone": Route("alone", "its positions"),
}


class Interrupted(Exception):
    """A training ended here."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model):
    """A directory with a scored run of 21 training and 3 held-out pairs."""
    where = tmp_path_factory.mktemp("scored")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    refscore_here(where, "precompute", "--config", experiment(where, tiny_model, data), "--run", "scored")
    return where


@pytest.fixture
def train(scored, tmp_path, monkeypatch):
    """A function: trains a run on the scored pairs and returns it."""
    shutil.copytree(scored / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def run_of(name, *settings, **options):
        run = open_run(name)
        if not run.directory.exists():
            run.directory.mkdir()
            shutil.copy(open_run("scored").pairs, run.pairs)
        config = load_config(scored / "experiment.yaml", ["train.learning_rate=0.01", "train.report_to=[]", *settings])
        pipeline.training.train.train(config, run, **options)
        return run

    return run_of


@contextmanager
def interrupted(monkeypatch, step):
    """A context in which a training ends before it takes `step` (1-based)."""
    inner, count = pipeline.training.loop.accumulate, itertools.count(1)

    def counting(*args):
        if next(count) == step:
            raise Interrupted
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.training.loop, "accumulate", counting)
        with pytest.raises(Interrupted):
            yield


def pairs_of(run, split):
    return pl.read_parquet(run.pairs).filter(pl.col("split") == split)


def kept_of(run, split):
    return pl.DataFrame(read_table(run.policy_logps, POLICY_LOGPS)).filter(pl.col("split") == split)


def plain(model, row, side):
    """The sum of a response's logps, by a plain forward pass of transformers."""
    prompt, response = row["prompt_ids"], row[f"{side}_ids"]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).double().sum()


def by_hand(base, run, steps):
    """(updates, chosen, rejected) of each training pair's last visit, in a loop of plain forward passes and torch's AdamW."""
    train = load_config(run.config).train
    rows = pairs_of(run, "train").to_dicts()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    last = {}
    for step in range(steps):
        losses = []
        for at in pairs_of_step(step, len(rows), train):
            chosen, rejected = (plain(model, rows[at], side) for side in ("chosen", "rejected"))
            last[rows[at]["pair_id"]] = (step, chosen.item(), rejected.item())
            ratios = chosen - rows[at]["ref_chosen_logps"] - rejected + rows[at]["ref_rejected_logps"]
            losses.append(-torch.nn.functional.logsigmoid(train.beta * ratios))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, train)
        optimizer.step()
        optimizer.zero_grad()
    return last


def must_be_held_out(run, tiny_model, steps):
    """Held-out pairs: the base before the first step, what was saved after the last one, each once and in order."""
    rows, kept = pairs_of(run, "eval"), kept_of(run, "eval")
    assert kept["step"].to_list() == [0] * len(rows) + [steps] * len(rows)
    for directory, found in ((tiny_model, kept[: len(rows)]), (run.model, kept[len(rows) :])):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        assert found["pair_id"].to_list() == rows["pair_id"].to_list()
        for row, one in zip(rows.to_dicts(), found.to_dicts(), strict=True):
            for side in ("chosen", "rejected"):
                with torch.no_grad():
                    assert one[f"{side}_logps"] == pytest.approx(plain(model, row, side).item(), abs=2e-4)


def must_be_trained(run, expected):
    """Training pairs: in the table's order, one row each, at the step of their last visit."""
    kept = kept_of(run, "train")
    assert kept["pair_id"].to_list() == [name for name in pairs_of(run, "train")["pair_id"] if name in expected]
    for one in kept.to_dicts():
        step, *sums = expected[one["pair_id"]]
        assert one["step"] == step
        assert [one["chosen_logps"], one["rejected_logps"]] == pytest.approx(sums, abs=5e-3)


# each way with one layout: both with each would be the same passes once more
@pytest.mark.parametrize(("way", "layout"), list(zip(WAYS, ["tree", "separate"] * 2, strict=True)))
def test_values_are_those_of_plain_passes_whatever_the_way(train, tiny_model, monkeypatch, layout, way):
    monkeypatch.setattr("pipeline.forward.logps.route_of", lambda model, precision, device: WAYS[way])
    # several forward passes a step, and two epochs whose border lies within a step
    settings = ("train.max_steps=-1", "train.num_train_epochs=2", "train.tokens_per_batch=150")
    run = train("r", *settings, f"train.layout={layout}")
    expected = by_hand(tiny_model, run, 11)
    assert len(expected) == 21
    assert {step for step, *_ in expected.values()} == {5, 6, 7, 8, 9, 10}
    must_be_trained(run, expected)
    must_be_held_out(run, tiny_model, 11)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.gradient_accumulation_steps=1",),
        ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4", "train.tokens_per_batch=1"),
        ("train.optimizer_in_backward=true", "train.max_grad_norm=null"),
        ("train.activation_offloading=true", "train.gradient_checkpointing=true"),
    ],
)
def test_values_do_not_depend_on_how_a_step_is_taken(train, tiny_model, settings):
    run = train("r", *settings)
    if "train.max_grad_norm=null" not in settings:
        must_be_trained(run, by_hand(tiny_model, run, 4))
    must_be_held_out(run, tiny_model, 4)
    # of each step, the mean that metrics.parquet says of the same passes; a pair that no step had has no row
    kept, metrics = kept_of(run, "train"), pl.read_parquet(run.metrics)
    assert len(kept) == 4 * (2 if "train.gradient_accumulation_steps=1" in settings else 4) < 21
    for side in ("chosen", "rejected"):
        means = kept.group_by("step").agg(pl.col(f"{side}_logps").mean()).sort("step")
        assert means["step"].to_list() == [0, 1, 2, 3]
        assert means[f"{side}_logps"].to_list() == pytest.approx(metrics[f"logps/{side}"].drop_nulls().to_list())


@pytest.mark.parametrize("loss", ["[sft]", "[simpo]", "[cpo]", "[aot]", "[sigmoid,sft]", "[ipo]"])
def test_every_kind_of_preference_loss_keeps_both_sides(train, tiny_model, loss):
    """Losses without a reference, and those that need the whole step before they know a pair's loss."""
    run = train("r", f"train.loss_type={loss}", "train.tokens_per_batch=100", "train.ld_alpha=null")
    must_be_held_out(run, tiny_model, 4)
    kept, metrics = kept_of(run, "train"), pl.read_parquet(run.metrics)
    for side in ("chosen", "rejected"):
        means = kept.group_by("step").agg(pl.col(f"{side}_logps").mean()).sort("step")[f"{side}_logps"]
        assert means.to_list() == pytest.approx(metrics[f"logps/{side}"].drop_nulls().to_list())


def test_sums_are_plain_whatever_a_loss_weighs(train, tiny_model):
    run = train("r", "train.ld_alpha=0.1", "train.use_weighting=true")
    must_be_held_out(run, tiny_model, 4)


def test_an_adapter_is_the_policy_too(train, tiny_model):
    run = train("r", "policy.lora={r: 4, alpha: 32}")
    must_be_held_out(run, tiny_model, 4)
    kept = kept_of(run, "eval")
    assert not kept[:3].drop("step").equals(kept[3:].drop("step"))


def test_a_reward_model_has_none(train):
    run = train("r", "train.objective=reward")
    assert not run.policy_logps.exists()
    assert not list(run.checkpoints.rglob("policy_logps*"))


def test_without_held_out_pairs_training_pairs_are_kept_alone(train):
    run = open_run("r")
    run.directory.mkdir()
    shutil.copy(open_run("scored").pairs, run.pairs)
    only = pl.read_parquet(run.pairs)["split"].to_list().count("train")
    logps = PolicyLogps(run.policy_logps, some(only), some(0))
    logps.note([2], torch.tensor([[-1.0], [-2.0]], dtype=torch.float64))
    logps.keep_step(0)
    logps.write()
    assert logps.state().keys() == {"train/logps", "train/updates"}
    assert kept_of(run, "train").rows() == [("p2", "train", 0, -1.0, -2.0)]


RESUMED = {
    "two epochs": ("train.max_steps=-1", "train.num_train_epochs=2", "train.save_steps=2", "train.eval_steps=3"),
    "dropout": ("train.max_steps=7", "train.save_steps=2", "policy.lora={r: 4, alpha: 32, dropout: 0.5}"),
    "whole steps": ("train.max_steps=7", "train.save_steps=2", "train.loss_type=[aot]", "train.tokens_per_batch=100"),
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_an_interruption_changes_no_byte(train, monkeypatch, settings):
    whole = train("whole", *settings)
    with interrupted(monkeypatch, step=6):
        train("r", *settings)
    run = open_run("r")
    # pairs of the first epoch are in the checkpoint, and no step after it
    assert newest_checkpoint(run.checkpoints).step == 4
    assert kept_of(run, "train")["step"].max() == 3
    run.policy_logps.unlink()
    train("r", *settings)
    assert run.policy_logps.read_bytes() == whole.policy_logps.read_bytes()


def test_a_file_that_is_newer_than_the_checkpoint_does_not_matter(train, monkeypatch):
    settings = ("train.max_steps=8", "train.save_steps=2", "train.eval_steps=2")
    whole = train("whole", *settings)

    def reached(point):
        if point == "checkpoint: log-probabilities written" and newest_checkpoint(open_run("r").checkpoints):
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.artifacts.durable.reached", reached)
        with pytest.raises(Interrupted):
            train("r", *settings)
    run = open_run("r")
    assert newest_checkpoint(run.checkpoints).step == 2
    assert kept_of(run, "eval")["step"].max() == 4
    train("r", *settings)
    assert run.policy_logps.read_bytes() == whole.policy_logps.read_bytes()


def test_a_training_whose_end_was_interrupted_writes_what_it_knew(train, monkeypatch):
    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.training.train, "save_policy", interrupting)
        with pytest.raises(Interrupted):
            train("r")
    run = open_run("r")
    run.policy_logps.unlink()
    train("r")
    assert run.policy_logps.read_bytes() == whole.policy_logps.read_bytes()


def interrupting(*_, **__):
    raise Interrupted


def test_a_checkpoint_of_an_earlier_version_goes_on_with_what_follows(train, monkeypatch):
    settings = ("train.max_steps=4", "train.save_steps=2")
    whole = train("whole", *settings)
    with monkeypatch.context() as patch:
        patch.setattr(PolicyLogps, "state", lambda self: {})
        with interrupted(monkeypatch, step=3):
            train("r", *settings)
    run = open_run("r")
    assert load_policy_logps(newest_checkpoint(run.checkpoints)) == {}
    train("r", *settings)
    expected = pl.DataFrame(read_table(whole.policy_logps, POLICY_LOGPS)).filter(
        (pl.col("split") == "train") & (pl.col("step") >= 2) | (pl.col("split") == "eval") & (pl.col("step") == 4)
    )
    assert pl.DataFrame(read_table(run.policy_logps, POLICY_LOGPS)).equals(expected)


def test_what_another_training_of_the_run_left_goes(train, monkeypatch):
    with interrupted(monkeypatch, step=2):
        train("r")
    run = open_run("r")
    shutil.copy(run.pairs, run.policy_logps)  # anything
    train("r", "train.objective=reward")
    assert not run.policy_logps.exists()
    train("r", restart=True)
    assert len(kept_of(run, "train")) == 16
    # also if the new one does not come to its first step
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.training.train, "load_policy", interrupting)
        with pytest.raises(Interrupted):
            train("r", restart=True)
    assert not run.policy_logps.exists()


def test_a_step_that_is_not_finite_is_not_kept(train):
    wild = ("train.learning_rate=1e30", "train.lr_scheduler_type=constant", "train.warmup_ratio=0")
    with pytest.raises(CheckError, match="training stops"):
        train("r", *wild)
    kept = kept_of(open_run("r"), "train")
    assert kept["step"].to_list() == [0] * 4
    assert np.isfinite(kept["chosen_logps"].to_numpy()).all()


def some(number):
    return Pairs([f"p{at}" for at in range(number)], [Tree([1], ([2], [3]))] * number, [], [])


def test_tables_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.records.policy_logps._AT_ONCE", 4)
    logps = PolicyLogps(tmp_path / "t.parquet", some(11), some(3))
    sums = torch.arange(10, dtype=torch.float64).reshape(2, 5)
    logps.note([10, 0, 9, 1, 2], sums)
    logps.keep_step(7)
    logps.note([1, 0, 2], sums[:, :3])
    logps.keep_evaluation(0)
    logps.note([1], sums[:, :1] - 1)
    logps.keep_evaluation(9)
    logps.write()
    assert pl.DataFrame(read_table(tmp_path / "t.parquet", POLICY_LOGPS)).rows() == [
        ("p0", "train", 7, 1.0, 6.0),
        ("p1", "train", 7, 3.0, 8.0),
        ("p2", "train", 7, 4.0, 9.0),
        ("p9", "train", 7, 2.0, 7.0),
        ("p10", "train", 7, 0.0, 5.0),
        ("p0", "eval", 0, 1.0, 6.0),
        ("p1", "eval", 0, 0.0, 5.0),
        ("p2", "eval", 0, 2.0, 7.0),
        ("p1", "eval", 9, -1.0, 4.0),
    ]


def test_nothing_is_written_twice_or_of_nothing(tmp_path):
    logps = PolicyLogps(tmp_path / "t.parquet", some(2), some(2))
    logps.write()
    assert not list(tmp_path.iterdir())
    logps.note([0], torch.zeros(2, 1))
    logps.write()
    assert not list(tmp_path.iterdir())
    logps.keep_step(0)
    logps.write()
    (tmp_path / "t.parquet").unlink()
    # what was noted is kept once
    logps.keep_step(5)
    logps.write()
    assert not list(tmp_path.iterdir())
    assert logps.state()["train/updates"].tolist() == [0, -1]


def test_a_pair_takes_twenty_bytes_at_each_moment():
    many = dataclasses.replace(some(0), pair_ids=range(10**6))
    logps = PolicyLogps(None, many, many)
    for keep in (logps.keep_step, logps.keep_evaluation):
        for updates in (0, 3):
            logps.note([10**6 - 1], torch.zeros(2, 1))
            keep(updates)
    assert sum(tensor.nbytes for tensor in logps.state().values()) == 3 * 20 * 10**6


def test_a_state_of_other_pairs_is_not_taken(tmp_path, caplog):
    logps, other = PolicyLogps(tmp_path / "t", some(3), some(0)), PolicyLogps(tmp_path / "t", some(2), some(0))
    logps.note([2], torch.ones(2, 1))
    logps.keep_step(0)
    with caplog.at_level(logging.WARNING):
        other.load(logps.state())
    assert "begins anew: the checkpoint's was of 3 pairs, not of 2" in caplog.text
    assert other.state() == {}
