"""Checkpoints by themselves: everything comes back bit for bit, whole ones only, the newest first."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import durable
from pipeline.errors import DataError, RefscoreError
from pipeline.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_policy_logps,
    newest_checkpoint,
    save_checkpoint,
)


def model_and_optimizer(seed=0, *, steps=2, bias=True):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=bias))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def states(model, optimizer):
    return {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_weights_moments_and_random_state_come_back_bit_for_bit(tmp_path):
    model, optimizer = model_and_optimizer()
    weights, before = {name: p.clone() for name, p in model.named_parameters()}, states(model, optimizer)
    directory = save_checkpoint(tmp_path, 7, "training", model, optimizer, 1)
    assert directory == tmp_path / "step_000007"
    drawn = torch.randn(3)
    other, its = model_and_optimizer(1)
    frozen = other[0].weight.clone()
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint == Checkpoint(directory, 7, "training")
    load_checkpoint(checkpoint, other, its)
    assert torch.equal(torch.randn(3), drawn)
    for name, parameter in other.named_parameters():
        # what does not learn is in no checkpoint
        assert torch.equal(parameter, frozen if name == "0.weight" else weights[name])
    after = states(other, its)
    assert after.keys() == before.keys()
    for name, fields in before.items():
        assert after[name].keys() == fields.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(after[name][key], value) for key, value in fields.items())


def test_what_is_written_is_safetensors_and_json_with_digests(tmp_path):
    model, optimizer = model_and_optimizer()
    directory = save_checkpoint(tmp_path, 12, "t", model, optimizer, 1)
    assert {path.name for path in directory.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert load_file(directory / "model.safetensors").keys() == {"0.bias", "1.weight", "1.bias"}
    tensors = load_file(directory / "optimizer.safetensors")
    fields = {
        f"{name}/{field}" for name in ("0.bias", "1.weight", "1.bias") for field in ("step", "exp_avg", "exp_avg_sq")
    }
    assert tensors.keys() == fields | {"random/cpu"}
    state = json.loads((directory / "state.json").read_text())
    assert (state["step"], state["training"]) == (12, "t")
    assert state["files"].keys() == {"model.safetensors", "optimizer.safetensors"}
    assert all(len(digest) == 64 for digest in [*state["files"].values(), state["digest"]])


def test_log_probabilities_of_pairs_come_back_and_are_not_needed(tmp_path):
    model, optimizer = model_and_optimizer()
    logps = {"train/logps": torch.tensor([[-1.5], [-2.5]], dtype=torch.float64), "train/updates": torch.tensor([3])}
    with_them = save_checkpoint(tmp_path, 4, "t", model, optimizer, 3, logps)
    found = load_policy_logps(newest_checkpoint(tmp_path))
    assert found.keys() == logps.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in logps.items())
    assert found["train/logps"].dtype == torch.float64
    assert set(json.loads((with_them / "state.json").read_text())["files"]) == {
        "model.safetensors", "optimizer.safetensors", "policy_logps.safetensors",
    }  # fmt: skip
    # none, as of a reward model, or of an earlier version
    for step, none in ((5, {}), (6, None)):
        without = save_checkpoint(tmp_path, step, "t", model, optimizer, 3, none)
        assert not (without / "policy_logps.safetensors").exists()
        assert load_policy_logps(newest_checkpoint(tmp_path)) == {}
    load_checkpoint(Checkpoint(with_them, 4, "t"), *model_and_optimizer(1))


def test_so_many_are_kept_and_leftovers_go(tmp_path):
    model, optimizer = model_and_optimizer()
    leftover = tmp_path / f"{durable.TEMPORARY}old"
    leftover.mkdir()  # of a process that was killed
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, "t", model, optimizer, 2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000010"]
    assert not leftover.exists()
    # the same step again, of another training, takes the place of the first
    save_checkpoint(tmp_path, 10, "u", model, optimizer, 2)
    assert newest_checkpoint(tmp_path).training == "u"


def test_integers_and_shared_tables_of_an_optimizer_come_back_as_they_were(tmp_path):
    """As bitsandbytes keeps them: a step that is a Python integer, and one table for all weights."""
    model, optimizer = model_and_optimizer(steps=0)
    table = torch.arange(4.0)
    learning = [p for p in model.parameters() if p.requires_grad]
    for at, parameter in enumerate(learning):
        optimizer.state[parameter] = {"step": 3 + at, "table": table, "turned": torch.arange(6.0).view(2, 3).T}
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 1)
    other, its = model_and_optimizer(1)
    load_checkpoint(newest_checkpoint(tmp_path), other, its)
    for at, parameter in enumerate(p for p in other.parameters() if p.requires_grad):
        state = its.state[parameter]
        assert state.keys() == {"step", "table", "turned"}
        assert (type(state["step"]), state["step"]) == (int, 3 + at)
        assert torch.equal(state["table"], table)
        assert torch.equal(state["turned"], torch.arange(6.0).view(2, 3).T)


def test_an_optimizer_that_has_not_stepped_is_kept_too(tmp_path):
    model, optimizer = model_and_optimizer(steps=0)
    save_checkpoint(tmp_path, 0, "t", model, optimizer, 1)
    other, its = model_and_optimizer(1)
    load_checkpoint(newest_checkpoint(tmp_path), other, its)
    assert all(its.state[parameter] == {} for parameter in other.parameters() if parameter.requires_grad)


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 1)
    with pytest.raises(DataError, match=r"was saved from another model: start again with --restart"):
        load_checkpoint(newest_checkpoint(tmp_path), *model_and_optimizer(bias=False))


def test_the_first_one_makes_its_place(tmp_path):
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path / "runs" / "r", 1, "t", model, optimizer, 1)
    assert newest_checkpoint(tmp_path / "runs" / "r").step == 1


def test_what_cannot_be_removed_stays_and_does_not_stop_a_training(tmp_path, monkeypatch):
    """On a network file system a file that somebody reads may refuse to go."""
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 1)
    (tmp_path / f"{durable.TEMPORARY}old").mkdir()
    monkeypatch.setattr("os.rmdir", refusing)
    save_checkpoint(tmp_path, 2, "t", model, optimizer, 1)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).step == 2


def refusing(*_, **__):
    raise OSError(16, "Device or resource busy")


def test_there_may_be_none(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None


def changed_state(directory, **values):
    path = directory / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: changed_state(d, step=3), "state.json changed since it was saved"),
        (lambda d: (d / "state.json").write_text("[]"), "is not whole"),
        (lambda d: (d / "state.json").write_text("{}"), "is not whole"),
        (lambda d: (d / "state.json").write_text("{"), "is not whole"),
        (lambda d: (d / "state.json").unlink(), "is not whole"),
        (lambda d: (d / "model.safetensors").unlink(), "is not whole"),
        (lambda d: (d / "optimizer.safetensors").write_bytes(b"x"), "optimizer.safetensors changed since it was saved"),
        (
            lambda d: (d / "policy_logps.safetensors").write_bytes(b"x"),
            "policy_logps.safetensors changed since it was saved",
        ),
        (lambda d: (d / "policy_logps.safetensors").unlink(), "is not whole"),
    ],
)
def test_what_is_damaged_is_named_and_passed_over(tmp_path, caplog, damage, said):
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 2)
    newer = save_checkpoint(tmp_path, 2, "t", model, optimizer, 2, {"train/updates": torch.tensor([1])})
    damage(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path).step == 1
    assert f"{newer}" in caplog.text
    assert said in caplog.text


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.training.checkpoint.save_file", full)
    with pytest.raises(RefscoreError, match=r"step_000002.*(?i:space)"):
        save_checkpoint(tmp_path, 2, "t", model, optimizer, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert newest_checkpoint(tmp_path).step == 1


def test_the_random_state_of_a_gpu_is_kept_if_there_is_one(tmp_path, monkeypatch):
    model, optimizer = model_and_optimizer()
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([1, 2, 3], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", put_back.append)
    save_checkpoint(tmp_path, 1, "t", model, optimizer, 1)
    load_checkpoint(newest_checkpoint(tmp_path), model, optimizer)
    assert [state.tolist() for state in put_back] == [[1, 2, 3]]


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_the_new_one(tmp_path):
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 10, "t", model, optimizer, 1)
    (tmp_path / "step_000020").mkdir()
    (tmp_path / "step_000020" / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).step == 10
    save_checkpoint(tmp_path, 15, "t", model, optimizer, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000015"]
    # numbers, not names, say which is later
    save_checkpoint(tmp_path, 999_999, "t", model, optimizer, 2)
    save_checkpoint(tmp_path, 1_000_000, "t", model, optimizer, 2)
    assert newest_checkpoint(tmp_path).step == 1_000_000
