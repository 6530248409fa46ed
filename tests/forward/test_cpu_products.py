"""oneDNN's products are torch's own but for rounding."""

import pytest
import torch

from pipeline.forward import cpu_products
from pipeline.forward.cpu_products import FastProducts, recomputation


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN multiplied."""
    found = []
    multiply = cpu_products._product
    monkeypatch.setattr(cpu_products, "_product", lambda *sides: found.append(1) or multiply(*sides))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1)])
def test_outputs_and_gradients_equal_torchs(bias, shape, calls):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias=bias)
    hidden, slope = torch.randn(*shape, 48, requires_grad=True), torch.randn(*shape, 40)
    leaves = [hidden, *layer.parameters()]
    plain = layer(hidden)
    assert not calls
    with FastProducts():
        ours = layer(hidden)
    assert len(calls) == 1
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    pairs = (torch.autograd.grad(found, leaves, slope) for found in (ours, plain))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_other_digits_are_left_to_torch(calls):
    layer = torch.nn.Linear(8, 8)
    with FastProducts(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8)).dtype == torch.bfloat16
    with FastProducts():
        assert layer.double()(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64
    assert not calls


def test_a_checkpointed_layer_is_computed_the_same_way_twice(calls):
    layer = torch.nn.Linear(8, 8)
    with FastProducts():
        found = torch.utils.checkpoint.checkpoint(
            layer, torch.randn(2, 8, requires_grad=True), use_reentrant=False, context_fn=recomputation
        )
    found.sum().backward()
    # forward, again in the backward pass, and two gradients
    assert len(calls) == 4
