"""The forward pass without a model: what goes to the layers, and where each number of the output layer belongs."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pipeline.forward.logps
from pipeline.forward import cpu_products
from pipeline.forward.logps import Forward, Hidden, forward_of, hidden_states_of
from pipeline.forward.output_layer import OutputLayer
from pipeline.forward.trees import Tree

TREES = [
    Tree([1, 2], ([3, 4, 5], [6])),
    Tree([9], ([3],)),
    Tree([1, 2], ([6], [7, 8])),
]
LAYER = OutputLayer(torch.nn.Parameter(torch.randn(12, 4, generator=torch.Generator().manual_seed(0))), None, 1.0, None)


def state(prefix):
    """The hidden state after these ids."""
    return torch.from_numpy(np.random.default_rng(list(prefix)).normal(size=4)).float()


def hidden_of(trees):
    rows = [
        state([*tree.trunk, *branch[:at]]) for tree in trees for branch in tree.branches for at in range(len(branch))
    ]
    return torch.stack(rows)


def logp(prefix):
    return (LAYER.weight_VH @ state(prefix)).log_softmax(0)


@pytest.fixture
def read():
    return []


@pytest.fixture
def forward(read):
    return Forward(
        Hidden(lambda trees: read.append(trees) or hidden_of(trees), lambda trees: 100 * len(trees)),
        LAYER,
        torch.float32,
    )


def test_each_token_has_the_number_of_its_own_prefix(forward, read):
    found = forward(TREES)
    assert [[len(values) for values in tree] for tree in found] == [[3, 1], [1], [1, 2]]
    for tree, branches in zip(TREES, found, strict=True):
        for branch, values in zip(tree.branches, branches, strict=True):
            wanted = [logp([*tree.trunk, *branch[:at]])[token] for at, token in enumerate(branch)]
            torch.testing.assert_close(values, torch.stack(wanted))
            assert values.dtype == torch.float32
    # what is equal is read once
    assert read == [[Tree((1, 2), ((3, 4, 5), (6,), (7, 8))), Tree((9,), ((3,),))]]
    assert forward.tokens(TREES) == 200


def test_squares_stand_beside_them_if_they_are_asked_for(forward):
    logps, squares = forward.aligned(TREES)
    assert all(
        torch.equal(a, b) for one, two in zip(logps, forward(TREES), strict=True) for a, b in zip(one, two, strict=True)
    )
    for tree, branches in zip(TREES, squares, strict=True):
        for branch, values in zip(tree.branches, branches, strict=True):
            wanted = [(2 * logp([*tree.trunk, *branch[:at]])).logsumexp(0) for at in range(len(branch))]
            torch.testing.assert_close(values, torch.stack(wanted))
    assert forward.aligned(TREES, squares=False)[1] == []


def test_a_pass_without_squares_computes_none(forward, monkeypatch):
    asked = []
    monkeypatch.setattr(
        OutputLayer,
        "logps",
        lambda self, hidden, targets, coarse, *, squares: (
            asked.append((coarse, squares, targets.tolist())) or (torch.zeros(len(targets)), torch.zeros(0))
        ),
    )
    forward(TREES)
    assert asked == [(torch.float32, False, [3, 4, 5, 6, 7, 8, 3])]


class Model(torch.nn.Module):
    def __init__(self, device="cpu"):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(1, device=device))


@pytest.fixture
def routed(monkeypatch):
    """A route that notes what it is asked, under which arithmetic."""
    seen = []

    def hidden(model, trees, *, tree):
        # a mode of torch's is on while a function goes through it
        fast = [type(mode) for mode in torch.overrides._get_current_function_mode_stack()]
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((model, trees, tree, autocast, cpu_products.FastProducts in fast))
        return "hidden"

    route = SimpleNamespace(hidden=hidden, tokens=lambda trees, *, tree: (len(trees), tree), why=None, kind="packed")
    asked = []
    monkeypatch.setattr(pipeline.forward.logps, "route_of", lambda *given: asked.append(given) or route)
    route.seen, route.asked = seen, asked
    return route


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize(
    ("device", "precision", "autocast", "fast"),
    [
        ("cpu", torch.float32, None, True),
        ("cpu", torch.bfloat16, torch.bfloat16, False),
        ("meta", torch.float32, None, False),
    ],
)
def test_the_layers_run_in_the_arithmetic_that_is_asked_for(routed, layout, device, precision, autocast, fast):
    model = Model(device)
    found = hidden_states_of(model, layout, precision)
    assert routed.asked == [(model, precision, torch.device(device))]
    assert found.of(TREES) == "hidden"
    assert routed.seen == [(model, TREES, layout == "tree", autocast, fast)]
    assert found.tokens(TREES) == (3, layout == "tree")
    # and no longer than that
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("packed", "longer sequences each alone"),
        ("padded", "separate padded sequences"),
        ("alone", "every sequence alone"),
    ],
)
def test_another_way_of_reading_is_said_with_its_reason(routed, caplog, kind, said):
    routed.kind = kind
    with caplog.at_level(logging.WARNING):
        hidden_states_of(Model(), "tree", torch.float32)
        assert not caplog.text
        routed.why = "windows are not told"
        hidden_states_of(Model(), "tree", torch.float32)
    assert f"layout: {said}, as windows are not told" in caplog.text


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_layers_and_output_layer_are_of_one_model_and_one_precision(routed, monkeypatch, precision):
    monkeypatch.setattr(pipeline.forward.logps, "output_layer_of", lambda model, checked: ("layer of", model, checked))
    model = Model()
    found = forward_of(model, "separate", precision)
    assert (found.layer, found.precision) == (("layer of", model, True), precision)
    # a head that is not whole cannot be tried
    assert forward_of(model, "separate", precision, whole=False).layer == ("layer of", model, False)
    del routed.asked[1:]
    assert routed.asked == [(model, precision, torch.device("cpu"))]
    elsewhere = hidden_states_of(model, "separate", precision, torch.device("meta"))
    assert routed.asked[1:] == [(model, precision, torch.device("meta"))]
    assert elsewhere.tokens(TREES) == (3, False)
    found.hidden.of(TREES)
    assert routed.seen[0][2] is False
    assert forward_of(model, "tree").precision == torch.float32
