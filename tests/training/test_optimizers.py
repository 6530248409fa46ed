"""One update, by hand: what is decayed, at what rate, clipped where, and what a gradient that is no number changes."""

import math
import sys

import pytest
import torch
from transformers.optimization import Adafactor

from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.training.optimizers import make_optimizer, update


class Small(torch.nn.Module):
    """A matrix, a bias, and a matrix that does not learn."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.full((2, 3), 0.5))
        self.bias = torch.nn.Parameter(torch.full((3,), 0.5))
        self.frozen = torch.nn.Parameter(torch.full((2, 2), 0.5), requires_grad=False)

    def with_gradients(self, of_matrix, of_bias):
        self.matrix.grad = torch.full_like(self.matrix, of_matrix)
        self.bias.grad = torch.full_like(self.bias, of_bias)
        return self


def train(**fields):
    return TrainConfig(**{"learning_rate": 0.01, "weight_decay": 0.5, **fields})


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_what_learns_is_grouped_by_whether_it_is_decayed(name):
    model = Small()
    optimizer = make_optimizer(model, train(optimizer=name))
    found = [(group["params"], group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert [[id(one) for one in some] for some, *_ in found] == [[id(model.matrix)], [id(model.bias)]]
    assert [rest for _, *rest in found] == [[0.5, 0.01], [0.0, 0.01]]
    kind = {"adamw": "AdamW", "adamw_8bit": "AdamW8bit", "adafactor": "Adafactor"}[name]
    assert type(optimizer).__name__ == kind
    if name == "adamw":
        assert optimizer.defaults["fused"]


def test_a_kind_of_weights_that_is_absent_makes_no_group():
    for left in ("matrix", "bias"):
        model = Small()
        getattr(model, left).requires_grad_(False)
        (group,) = make_optimizer(model, train()).param_groups
        assert group["weight_decay"] == (0.0 if left == "matrix" else 0.5)


def test_the_first_step_of_adamw_is_the_rate_and_the_decay():
    model = Small().with_gradients(0.001, -0.001)
    norm = update(model, make_optimizer(model, train()), 0.02, 1.0)["grad_norm"]
    assert norm == pytest.approx(0.001 * 9**0.5)
    # the rate that is given, not the one of before; a matrix is decayed by rate times weight_decay too
    assert torch.allclose(model.matrix, torch.tensor(0.5 - 0.02 * 0.5 * 0.5 - 0.02), atol=1e-6)
    assert torch.allclose(model.bias, torch.tensor(0.5 + 0.02), atol=1e-6)
    assert torch.equal(model.frozen, torch.full((2, 2), 0.5))
    assert model.matrix.grad is None
    assert model.bias.grad is None


def test_gradients_are_clipped_together_and_the_norm_is_that_of_before():
    """With plain descent, whose step is the gradient."""
    for max_norm, factor in ((1.0, 1 / 3), (5.0, 1.0)):
        model = Small().with_gradients(1.0, 1.0)
        norm = update(model, torch.optim.SGD([model.matrix, model.bias], lr=9.0), 0.1, max_norm)["grad_norm"]
        assert norm == pytest.approx(3.0)
        for weights in (model.matrix, model.bias):
            assert torch.allclose(weights, torch.tensor(0.5 - 0.1 * factor), atol=1e-5)


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(gradient):
    model = Small().with_gradients(gradient, 1.0)
    optimizer = make_optimizer(model, train())
    assert not math.isfinite(update(model, optimizer, 0.02, 1.0)["grad_norm"])
    assert torch.equal(model.bias, torch.full((3,), 0.5))
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert model.matrix.grad is None


def test_a_loss_that_is_no_number_changes_nothing_though_its_gradient_is_one():
    model = Small().with_gradients(1.0, 1.0)
    optimizer = make_optimizer(model, train())
    values = update(model, optimizer, 0.02, 1.0, {"loss": torch.tensor(float("nan"))})
    assert list(values) == ["loss", "grad_norm"]
    assert not optimizer.state


def test_adafactor_is_set_as_the_trainer_of_transformers_sets_it():
    model = Small().with_gradients(0.3, 0.3)
    optimizer = make_optimizer(model, train(optimizer="adafactor"))
    assert isinstance(optimizer, Adafactor)
    for group in optimizer.param_groups:
        assert (group["scale_parameter"], group["relative_step"], group["warmup_init"]) == (False, False, False)


def test_a_package_that_is_absent_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes: .* pip install bitsandbytes"):
        make_optimizer(Small(), train(optimizer="adamw_8bit"))
