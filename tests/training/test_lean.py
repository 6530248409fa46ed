"""Training in less memory: each way by what it must not change, or by how little it may."""

import json

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.forward.compiled import compile_layers
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.training.inputs.batches import micro_batches
from pipeline.training.lean import StepInBackward, offloaded_activations
from pipeline.training.optimizers import make_optimizer, numbers, round_by_chance, update
from pipeline.training.save import saved_dtype
from pipeline.training.step import NotFinite, accumulate, evaluate, must_be_finite
from pipeline.training.train import _must_be_single_passes
from tests.training.policy import config_of, policy_of, steps

BFLOAT16 = ("policy.dtype=bfloat16", "train.precision=bfloat16")


def rounded_by_chance(values):
    return round_by_chance(values, torch.empty_like(values, dtype=torch.bfloat16))


def test_rounding_by_chance_has_the_value_as_its_mean_and_no_others_than_its_neighbours():
    torch.manual_seed(0)
    value = 1.0 + 2**-7 * 0.3
    drawn = rounded_by_chance(torch.full((100_000,), value)).float()
    assert set(drawn.tolist()) == {1.0, 1.0 + 2**-7}
    assert drawn.mean().item() == pytest.approx(value, abs=1e-4)
    exact = torch.tensor([0.0, -1.0, 3.0, -(2.0**-20)])
    assert torch.equal(rounded_by_chance(exact).float(), exact)
    assert rounded_by_chance(torch.full((9999,), -value)).float().mean().item() == pytest.approx(-value, abs=3e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_updates_below_the_last_digit_are_not_lost(optimizer):
    """A rate of 1e-5 on weights of 1: to the nearest, not one of a hundred steps would change anything."""
    model = torch.nn.Linear(128, 64, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    chosen = make_optimizer(model, config_of("x", f"train.optimizer={optimizer}").train)
    torch.manual_seed(0)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        update(model, chosen, 1e-5, 1e9)
    assert model.weight.dtype == torch.bfloat16
    # every step of AdamW with an even gradient is the rate
    assert model.weight.float().mean().item() == pytest.approx(1 - 100 * 1e-5, abs=2e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weights_of_16_bits_learn_as_those_of_32_and_resume_bit_for_bit(tmp_path, tiny_model, pairs, optimizer):
    losses = {}
    for settings in ((), BFLOAT16):
        config = config_of(tiny_model, f"train.optimizer={optimizer}", *settings)
        policy = policy_of(tiny_model, config)
        chosen = make_optimizer(policy.model, config.train)
        torch.manual_seed(0)
        losses[settings] = steps(policy, chosen, pairs, config, range(3))
        save_checkpoint(tmp_path / str(len(settings)), 3, "t", policy.model, chosen, 1)
        losses[settings] += steps(policy, chosen, pairs, config, range(3))
    assert policy.model.dtype == torch.bfloat16
    assert losses[BFLOAT16] == pytest.approx(losses[()], abs=0.05)
    assert losses[()][-1] < losses[()][0] - 0.05
    again = policy_of(tiny_model, config)
    second = make_optimizer(again.model, config.train)
    load_checkpoint(newest_checkpoint(tmp_path / "2"), again.model, second)
    assert steps(again, second, pairs, config, range(3)) == losses[BFLOAT16][3:]
    for mine, theirs in zip(again.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [(), BFLOAT16, ("train.gradient_checkpointing=true",)])
def test_a_step_inside_the_backward_pass_is_the_step_after_it(tiny_model, pairs, settings):
    found = []
    for within in (False, True):
        config = config_of(
            tiny_model, "train.max_grad_norm=null", f"train.optimizer_in_backward={str(within).lower()}", *settings
        )
        policy = policy_of(tiny_model, config)
        policy.model.train()
        optimizer = make_optimizer(policy.model, config.train)
        rate = config.train.learning_rate
        inside = StepInBackward(optimizer) if within else None
        for group in optimizer.param_groups:
            group["lr"] = rate
        values = []
        for step in range(3):
            torch.manual_seed(step)
            means = accumulate(policy.forward, pairs, range(8), config.train)
            if inside is None:
                values.append(update(policy.model, optimizer, rate, None, means))
            else:
                values.append(numbers({**means, "grad_norm": inside.grad_norm()}))
                assert all(parameter.grad is None for parameter in policy.model.parameters())
        found.append(values)
    # which weight is rounded by which draw depends on the order of the weights
    tolerance = 0.05 if settings == BFLOAT16 else 1e-5
    for after, inside in zip(*found, strict=True):
        assert inside.keys() == after.keys()
        assert inside["loss"] == pytest.approx(after["loss"], abs=tolerance)
        assert inside["grad_norm"] == pytest.approx(after["grad_norm"], rel=10 * tolerance)


def test_gradients_that_are_not_kept_cannot_be_clipped_nor_summed_over_passes(tiny_model, pairs):
    with pytest.raises(ConfigError, match=r"set train\.max_grad_norm=null"):
        config_of(tiny_model, "train.optimizer_in_backward=true")
    settings = ("train.optimizer_in_backward=true", "train.max_grad_norm=null")
    config = config_of(tiny_model, *settings, "train.tokens_per_batch=60")
    policy = policy_of(tiny_model, config)
    assert len(list(micro_batches(policy.forward, pairs, range(8), config.train))) > 1
    with pytest.raises(ConfigError, match=r"the largest has (\d+) tokens, .* Set train.tokens_per_batch=\1") as refusal:
        _must_be_single_passes(policy, pairs, config.train, 2)
    needed = str(refusal.value).split("tokens_per_batch=")[1].split(",")[0]
    config = config_of(tiny_model, *settings, f"train.tokens_per_batch={needed}")
    _must_be_single_passes(policy, pairs, config.train, 2)
    assert len(list(micro_batches(policy.forward, pairs, range(8), config.train))) == 1


def test_a_loss_that_is_not_finite_says_whether_the_weights_are_spoiled(tiny_model, pairs):
    for settings, said in (
        ((), "before it spoils the weights"),
        (
            ("train.optimizer_in_backward=true", "train.max_grad_norm=null"),
            r"the weights in memory are spoiled and not saved",
        ),
    ):
        train = config_of(tiny_model, *settings).train
        with pytest.raises(NotFinite, match=said):
            must_be_finite({"loss": float("nan"), "grad_norm": 1.0}, pairs, [0, 1], train)


@pytest.mark.parametrize(
    ("base", "settings", "saved"),
    [
        ("float32", (), "float32"),
        ("bfloat16", (), "float32"),
        ("bfloat16", ("policy.save_dtype=base",), "bfloat16"),
        ("float16", ("policy.save_dtype=base",), "float16"),
        ("bfloat16", BFLOAT16, "bfloat16"),
        ("bfloat16", (*BFLOAT16, "policy.save_dtype=float32"), "float32"),
    ],
)
def test_a_model_is_saved_in_the_dtype_that_is_asked_for(tmp_path, tiny_model, base, settings, saved):
    content = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"dtype": base}))
    assert saved_dtype(config_of(tiny_model, *settings), tmp_path) == getattr(torch, saved)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.optimizer=adafactor", "needs an optimizer that rounds by chance"),
        ("train.objective=reward", "a reward model learns in float32"),
        ("train.precision=float32", "train.precision=float32 does not fit it"),
        ("policy.lora={r: 4}", "these are the adapters, float32"),
    ],
)
def test_what_16_bits_do_not_fit(tiny_model, setting, said):
    with pytest.raises(ConfigError, match=said):
        config_of(tiny_model, "policy.dtype=bfloat16", setting)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_offloaded_activations_change_no_bit_and_no_weight_is_moved(tiny_model, pairs, checkpointing, monkeypatch):
    monkeypatch.setattr("pipeline.training.lean.OFFLOADED_BYTES", 1)
    config = config_of(tiny_model, f"train.gradient_checkpointing={checkpointing}")
    policy = policy_of(tiny_model, config)
    policy.model.train()
    accumulate(policy.forward, pairs, range(8), config.train)
    expected = [parameter.grad for parameter in policy.model.parameters()]
    policy.model.zero_grad()
    moved, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: moved.append(size[0]) or empty(*size, **how))
    with offloaded_activations(policy.model):
        accumulate(policy.forward, pairs, range(8), config.train)
    for parameter, gradient in zip(policy.model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    shapes = [tuple(size) for size in moved if isinstance(size, torch.Size)]
    assert len(shapes) > 2
    assert not set(shapes) & {tuple(parameter.shape) for parameter in policy.model.parameters() if parameter.ndim > 1}


def test_compiled_layers_give_the_same(tiny_model, pairs):
    """By torch's own compiler, without the code that it would generate: that takes minutes and is torch's."""
    config = config_of(tiny_model)
    policy, plain = policy_of(tiny_model, config), policy_of(tiny_model, config)
    assert compile_layers(policy.model) == policy.model.config.num_hidden_layers
    layer = policy.model.model.layers[0]
    assert layer._compiled_call_impl is not None
    calls = []
    for compiled in policy.model.model.layers:
        compiled.compile(backend=lambda graph, inputs: calls.append(len(inputs)) or graph.forward)
    assert evaluate(policy.forward, pairs, config.train) == pytest.approx(
        evaluate(plain.forward, pairs, config.train), abs=1e-6
    )
    assert calls
