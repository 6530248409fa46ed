"""Optimizers, exports, checkpointing and reward models: what learns, what is saved, and that others load it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pipeline.training.policies
import pipeline.training.save
from pipeline.artifacts.runs import open_run
from pipeline.config.files import load_overrides
from pipeline.errors import CheckError, ConfigError
from pipeline.models.load import load_tokenizer
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.save import save_policy
from pipeline.training.step import evaluate, train_step
from tests.training.policy import config_of, policy_of, steps


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_every_optimizer_learns_and_resumes_without_changing_a_bit(tmp_path, tiny_model, pairs, optimizer):
    config = config_of(tiny_model, f"train.optimizer={optimizer}")
    policy = policy_of(tiny_model, config)
    first = make_optimizer(policy.model, config.train)
    losses = steps(policy, first, pairs, config, range(2))
    save_checkpoint(tmp_path, 2, "t", policy.model, first, 1)
    losses += steps(policy, first, pairs, config, range(2, 5))
    assert losses[-1] < losses[0] - 0.05
    again = policy_of(tiny_model, config)
    second = make_optimizer(again.model, config.train)
    load_checkpoint(newest_checkpoint(tmp_path), again.model, second)
    assert steps(again, second, pairs, config, range(2, 5)) == losses[2:]
    for mine, theirs in zip(again.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("scale", [0.0, 0.02, 3.0])
def test_a_rate_makes_a_step_of_its_size_whatever_the_weights(optimizer, scale):
    """The root mean square of the first update is the rate: on layers, on large weights, on an adapter's zeros."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 128)
    with torch.no_grad():
        layer.weight.normal_(std=scale) if scale else layer.weight.zero_()
    before = layer.weight.detach().clone()
    rate = 1e-3
    train = load_overrides(
        {"data": {"path": "x"}}, [f"train.optimizer={optimizer}", f"train.learning_rate={rate}"]
    ).train
    chosen = make_optimizer(layer, train)
    layer(torch.randn(32, 64)).square().sum().backward()
    # gradients far larger and far smaller than any clip
    layer.weight.grad.mul_(1e-3)
    update(layer, chosen, rate, 1e9)
    step = (layer.weight - before).square().mean().sqrt().item()
    assert 0.5 * rate < step < 1.1 * rate


def test_optimizers_with_less_state_keep_less(tiny_model, pairs):
    sizes = {}
    for name in ("adamw", "adamw_8bit", "adafactor"):
        config = config_of(tiny_model, f"train.optimizer={name}")
        policy = policy_of(tiny_model, config)
        optimizer = make_optimizer(policy.model, config.train)
        steps(policy, optimizer, pairs, config, range(1))
        # the big matrices: 8-bit moments are for those of 4096 weights and more
        sizes[name] = sum(
            value.numel() * value.element_size()
            for parameter, state in optimizer.state.items()
            if parameter.numel() >= 4096
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        )
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]
    assert sizes["adafactor"] < 0.1 * sizes["adamw"]


SPOILED = {
    "a weight": ("train.seed=0", "model", lambda tensors: {name: tensor * 1.02 for name, tensor in tensors.items()}),
    "a head": (
        "train.objective=reward",
        "model",
        lambda tensors: {**tensors, "score.weight": tensors["score.weight"] * 0},
    ),
    "an adapter": ("policy.lora={r: 4, alpha: 64}", "adapter", lambda tensors: {n: t * 0 for n, t in tensors.items()}),
    "a merge": ("policy.lora={r: 4, alpha: 64}", "model", lambda tensors: {n: t * 1.02 for n, t in tensors.items()}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_export_that_is_not_what_was_trained_fails_and_replaces_nothing(tiny_model, pairs, what, monkeypatch):
    setting, name, spoil = SPOILED[what]
    config = config_of(tiny_model, setting)
    policy = policy_of(tiny_model, config, {branch[-1] for tree in pairs.trees for branch in tree.branches})
    steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3))
    run, tokenizer = open_run("spoiled"), load_tokenizer(tiny_model, config.policy)
    differences = save_policy(policy, tiny_model, config, run, "card", tokenizer, pairs.trees)
    assert name in differences
    assert max(differences.values()) < 1e-4
    (file,) = (run.model if name == "model" else run.adapter).glob("*.safetensors")
    before = file.read_bytes()
    write = pipeline.training.save._save_whole if name == "model" else pipeline.training.save.write_adapter

    def spoiled(model, *others):
        write(model, *others)
        directory = next(other for other in others if isinstance(other, Path) and other != tiny_model)
        (weights,) = directory.glob("*.safetensors")
        save_file(spoil(load_file(weights)), weights, {"format": "pt"})

    monkeypatch.setattr(pipeline.training.save, write.__name__, spoiled)
    with pytest.raises(CheckError, match="not what was trained"):
        save_policy(policy, tiny_model, config, run, "card", tokenizer, pairs.trees)
    assert file.read_bytes() == before
    assert not [path for path in run.directory.iterdir() if path.name.startswith(".tmp")]


def test_an_operation_without_a_gradient_stops_training(tiny_model, pairs):
    with torch.library._scoped_library("refscore_test", "DEF") as library:  # undone afterwards
        library.define("copy(Tensor x) -> Tensor")
        library.impl("copy", torch.clone, "CPU")
        config = config_of(tiny_model)
        policy = policy_of(tiny_model, config)
        policy.model.model.layers[0].mlp.register_forward_hook(lambda *args: torch.ops.refscore_test.copy(args[2]))
        with pytest.raises(CheckError, match=r"gradients do not pass .*refscore_test::copy"):
            train_step(policy.forward, pairs, range(8), config.train)


@pytest.mark.parametrize(("setting", "module"), [("policy.load_in_4bit=true", "bitsandbytes"), ("train.optimizer=adamw_8bit", "bitsandbytes.optim")])  # fmt: skip
def test_without_bitsandbytes_the_message_says_what_to_install(tiny_model, monkeypatch, setting, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    config = config_of(tiny_model, "policy.lora={r: 4}", setting)
    with pytest.raises(ConfigError, match="uv pip install bitsandbytes"):
        make_optimizer(policy_of(tiny_model, config).model, config.train)


@pytest.mark.parametrize("lora", [(), ("policy.lora={r: 4}",)])
def test_gradient_checkpointing_changes_memory_not_numbers(tiny_model, pairs, lora):
    found = []
    for setting in ("false", "true"):
        config = config_of(tiny_model, f"train.gradient_checkpointing={setting}", *lora)
        policy = policy_of(tiny_model, config)
        policy.model.train()
        assert policy.model.is_gradient_checkpointing == (setting == "true")
        found.append(steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_off_on_a_cpu_and_on_where_a_gpu_is(monkeypatch, device):
    monkeypatch.setattr(pipeline.training.policies, "device_kind", lambda: device)
    assert pipeline.training.policies.on_a_gpu("auto") == (device == "cuda")
    assert pipeline.training.policies.on_a_gpu(True)
    assert not pipeline.training.policies.on_a_gpu(False)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("lora", [(), ("policy.lora={r: 4, alpha: 64}",)])
def test_a_reward_model_learns_and_transformers_reads_the_same_scores(tiny_model, pairs, lora, layout):
    config = config_of(tiny_model, "train.objective=reward", f"train.layout={layout}", *lora)
    ends = {tree.branches[side][-1] for tree in pairs.trees for side in (0, 1)}
    policy = policy_of(tiny_model, config, ends - {0, 1, 2, 3} | {0})
    optimizer = make_optimizer(policy.model, config.train)
    losses = steps(policy, optimizer, pairs, config, range(12))
    assert losses[-1] < 0.7 * losses[0]
    figures = evaluate(policy.forward, pairs, config.train)
    assert "logps/chosen" not in figures
    run = open_run("reward")
    save_policy(policy, tiny_model, config, run, "card", load_tokenizer(tiny_model, config.policy), pairs.trees)
    model = AutoModelForSequenceClassification.from_pretrained(run.model, dtype=torch.float32).eval()
    policy.model.eval()
    assert model.config.num_labels == 1
    assert model.config.pad_token_id not in ends - {1, 2, 3}
    assert AutoTokenizer.from_pretrained(run.model).pad_token_id == model.config.pad_token_id
    with torch.no_grad():
        scores = policy.forward(pairs.trees)
        for tree, found in zip(pairs.trees, scores, strict=True):
            for branch, score in zip(tree.branches, found, strict=True):
                theirs = model(input_ids=torch.tensor([[*tree.trunk, *branch]])).logits
                assert float(theirs) == pytest.approx(float(score), abs=1e-4)


def test_a_vocabulary_without_a_token_to_fill_with_is_refused(tiny_model):
    config = config_of(tiny_model, "train.objective=reward")
    with pytest.raises(ConfigError, match="none is left"):
        policy_of(tiny_model, config, set(range(10)))
