"""Checkpoints that are written while the next steps are taken: of what there was, one at a time, and what fails is said."""

import threading
import time

import pytest
import torch

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError
from pipeline.training import saver
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint
from pipeline.training.optimizers import make_optimizer
from pipeline.training.parallel.world import ALONE
from pipeline.training.saver import Saver
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.training.policy import config_of, policy_of


@pytest.fixture
def trained(tiny_model):
    config = config_of(tiny_model)
    policy = policy_of(tiny_model, config)
    return policy, make_optimizer(policy.model, config.train)


def saver_of(root, tiny_model, *settings):
    return Saver(root, "t", config_of(tiny_model, "train.save_total_limit=3", *settings).train, ALONE)


def changed(policy, by):
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(by)


def test_what_is_written_behind_is_what_there_was_then(tmp_path, tiny_model, trained, monkeypatch):
    policy, optimizer = trained
    held, begun = threading.Event(), threading.Event()

    def reached(point):
        if point == "checkpoint: begun":
            begun.set()
            assert held.wait(60)

    monkeypatch.setattr(durable, "reached", reached)
    writes = saver_of(tmp_path, tiny_model, "train.async_save=true")
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    writes.save(1, policy, None, optimizer, {}, last=False)
    assert begun.wait(60)
    # the steps go on meanwhile
    changed(policy, 1.0)
    assert newest_checkpoint(tmp_path) is None
    held.set()
    writes.save(2, policy, None, optimizer, {}, last=True)
    # both are there: the first was waited for, the last is not left behind
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    other = policy_of(tiny_model, config_of(tiny_model))
    load_checkpoint(newest_checkpoint(tmp_path), other.model, make_optimizer(other.model, config_of(tiny_model).train))
    assert all(torch.equal(weight, before[name] + 1) for name, weight in other.model.named_parameters())
    (tmp_path / "step_000002" / "state.json").unlink()
    load_checkpoint(newest_checkpoint(tmp_path), other.model, make_optimizer(other.model, config_of(tiny_model).train))
    assert all(torch.equal(weight, before[name]) for name, weight in other.model.named_parameters())


def test_what_fails_behind_is_raised_where_the_training_waits(tmp_path, tiny_model, trained, monkeypatch):
    def full(point):
        if point == "checkpoint: weights written":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "reached", full)
    writes = saver_of(tmp_path, tiny_model, "train.async_save=true")
    writes.save(1, trained[0], None, trained[1], {}, last=False)
    with pytest.raises(RefscoreError, match="no space left to write"):
        writes.save(2, trained[0], None, trained[1], {}, last=True)


@pytest.mark.parametrize(
    ("setting", "kind", "free", "behind"),
    [
        ("auto", "cpu", 2**60, False),
        ("auto", "cuda", 2**60, True),
        ("auto", "cuda", 100_000, False),
        ("true", "cpu", 100_000, True),
        ("false", "cuda", 2**60, False),
    ],
)
def test_when_a_copy_is_made(tmp_path, tiny_model, trained, monkeypatch, setting, kind, free, behind):
    monkeypatch.setattr(saver, "device_kind", lambda: kind)
    monkeypatch.setattr(saver, "free_memory", lambda: free)
    copies, copied = [], saver.copied
    monkeypatch.setattr(saver, "copied", lambda tensors: copies.append(1) or copied(tensors))
    writes = saver_of(tmp_path, tiny_model, f"train.async_save={setting}")
    writes.save(1, trained[0], None, trained[1], {}, last=False)
    writes.wait()
    assert bool(copies) == behind
    assert newest_checkpoint(tmp_path).step == 1
    copies.clear()
    writes.save(2, trained[0], None, trained[1], {}, last=True)
    assert copies == []


def test_what_a_killed_process_left_makes_room_first(tmp_path, tiny_model):
    (tmp_path / f"{durable.TEMPORARY}1-x-step_000004").mkdir()
    saver_of(tmp_path, tiny_model)
    assert list(tmp_path.iterdir()) == []


def test_what_was_begun_is_finished_before_a_loss_that_is_not_finite_ends_the_training(
    tmp_path, tiny_model, monkeypatch
):
    train = {"learning_rate": 1e30, "save_steps": 1, "async_save": True, "warmup_ratio": 0.0, "max_grad_norm": None}
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(12)), train=train)
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    monkeypatch.setattr(durable, "reached", lambda point: time.sleep(1) if point == "checkpoint: begun" else None)
    assert "is nan" in refscore_here(tmp_path, "train", "--config", config, "--run", "r", code=4)
    checkpoints = tmp_path / "data/runs/r/checkpoints"
    assert newest_checkpoint(checkpoints) is not None
    assert [path.name for path in checkpoints.iterdir()] == [newest_checkpoint(checkpoints).directory.name]
