"""The path that a GPU takes, on this processor: FlexAttention over packs, and its block masks made from slices.

FlexAttention has no backward pass on CPU but the one in the open that it is checked against; that one is used here.
"""

import os

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention
from transformers.integrations import flex_attention as flex_of_transformers

from pipeline.forward import attention
from pipeline.forward.attention import Pack, as_attention_mask, attend
from pipeline.forward.block_mask import BLOCK, rectangles, visible_blocks
from pipeline.forward.compiled import compile_layers
from pipeline.forward.logps import forward_of
from pipeline.forward.routes import route_of
from pipeline.forward.trees import Tree, pack_trees, width_of
from tests.forward.test_architectures import FAMILIES, TREES, build, gradients, plain

CPU = torch.device("cpu")
# those that are packed, with windows, caps, shared heads, experts and latent heads; all of them in `make architectures`.
# Not gpt-oss: transformers refuses sinks in FlexAttention on CPU
SOME = ("Llama", "Qwen2, window", "Mixtral", "Gemma 2", "Gemma 3", "Phi-3, window", "Cohere 2", "GPT-2", "DeepSeek-V2")
WALKED = FAMILIES if os.environ.get("REFSCORE_WRITE_ARCHITECTURES") else SOME


@pytest.fixture
def flex(monkeypatch):
    """Attention as on a GPU, in the open."""
    monkeypatch.setattr(attention, "uses_flex", lambda _: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def some_trees(draw):
    def ids(most):
        return [1] * int(draw.integers(1, most))

    return [Tree(ids(400), tuple(ids(300) for _ in range(draw.integers(1, 4)))) for _ in range(draw.integers(1, 6))]


@pytest.mark.parametrize("window", [None, 1, 5, 127, 128, 255, 256, 300])
def test_blocks_are_what_the_mask_of_every_token_says(window):
    draw = np.random.default_rng(0)
    whole_blocks = 0
    for _ in range(20):
        _, pack, _ = pack_trees(some_trees(draw), CPU)
        total = len(pack.tree_T)
        places = torch.arange(total)
        seen = pack.may_see(window)(0, 0, places[:, None], places[None, :])
        number = -(-total // BLOCK)
        blocks = seen.view(number, BLOCK, number, BLOCK).transpose(1, 2).flatten(2)
        some, whole = visible_blocks(rectangles(pack.trees, pack.branches, total), total, window)
        assert torch.equal(torch.from_numpy(some), blocks.any(2))
        assert torch.equal(torch.from_numpy(whole), blocks.all(2))
        whole_blocks += whole.sum()
    assert (whole_blocks > 0) == (window in (None, 255, 256, 300))


@pytest.mark.parametrize("window", [None, 130])
def test_the_block_mask_is_the_one_that_torch_makes_from_every_token(window):
    _, pack, _ = pack_trees(some_trees(np.random.default_rng(3)), CPU)
    total = len(pack.tree_T)
    theirs = flex_attention.create_block_mask(pack.may_see(window), None, None, total, total, device="cpu")
    ours = pack.block_mask(window)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.sparsity() == theirs.sparsity()
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)


@pytest.mark.parametrize("family", WALKED)
def test_families_give_what_their_sequences_give_alone(family, flex):
    model = build(family)
    expected = torch.cat([plain(model, tree, branch) for tree in TREES for branch in tree.branches])
    by_plain = gradients(model, expected)
    try:
        forward = forward_of(model, "tree")
    except Exception:  # noqa: BLE001  # the walk of the other path says which are refused
        assert family not in SOME
        return
    if family in SOME:
        assert route_of(model, torch.float32).kind == "packed"
    ours = torch.cat([logps for tree in forward(TREES) for logps in tree])
    assert (ours - expected).abs().max() < 1e-4
    assert (gradients(model, ours) - by_plain).norm() / by_plain.norm() < 1e-4


def test_a_mask_that_is_wrong_is_noticed(flex, monkeypatch, caplog):
    """Planted: branches that see one another."""

    def everything(self, window):
        return flex_attention.create_block_mask(
            lambda b, h, q, k: (k <= q) & (self.tree_T[q] == self.tree_T[k]),
            None, None, len(self.tree_T), len(self.tree_T), device="cpu",
        )  # fmt: skip

    monkeypatch.setattr(Pack, "block_mask", everything)
    assert route_of(build("Llama"), torch.float32).kind == "padded"


def test_under_autocast_queries_keys_and_values_are_of_one_dtype(flex, monkeypatch):
    """Rotary embeddings widen queries and keys; FlexAttention refuses them beside narrow values."""
    _, pack, _ = pack_trees(TREES, CPU)
    query, key = torch.randn(1, 4, len(pack.tree_T), 8), torch.randn(1, 2, len(pack.tree_T), 8)
    value = torch.randn(1, 2, len(pack.tree_T), 8, dtype=torch.bfloat16)
    given, inner = [], flex_of_transformers.flex_attention_forward
    monkeypatch.setattr(
        flex_of_transformers,
        "flex_attention_forward",
        lambda module, *sides, **how: given.extend(side.dtype for side in sides[:3]) or inner(module, *sides, **how),
    )
    with torch.autocast("cpu", torch.bfloat16):
        attended, _ = attend(torch.nn.Module(), query, key, value, as_attention_mask(pack))
    assert given == [torch.bfloat16] * 3
    assert attended.dtype == torch.bfloat16
    assert attended.shape == (1, len(pack.tree_T), 4, 8)
    assert attended.isfinite().all()


def test_compiled_it_gives_the_same(monkeypatch):
    """Forward alone, as no compiled kernel has a backward pass here."""
    _, pack, _ = pack_trees(TREES, CPU)
    query, key, value = (torch.randn(1, heads, len(pack.tree_T), 16) for heads in (4, 2, 2))
    expected, _ = attend(torch.nn.Module(), query, key, value, as_attention_mask(pack), softcap=2.0, sliding_window=9)
    monkeypatch.setattr(attention, "uses_flex", lambda _: True)
    with torch.no_grad():
        ours, _ = attend(torch.nn.Module(), query, key, value, as_attention_mask(pack), softcap=2.0, sliding_window=9)
    real = pack.branch_T >= 0
    torch.testing.assert_close(ours[:, real], expected[:, real], atol=1e-5, rtol=0)


def test_many_packs_through_compiled_layers_need_few_graphs(monkeypatch):
    """Every pack differs from the last in the slices of its trees: none of them may be compiled into a graph.

    In training mode with checkpointing, whose second pass must find the graphs of the first. The graphs are run as they are, as
    no compiled FlexAttention has a backward pass here; the imitation keeps what torch guards by.
    """
    graphs = []

    def counted(function):
        return torch.compile(function, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(attention, "uses_flex", lambda _: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_of_transformers, "flex_attention", counted(flex_of_transformers.flex_attention))
    monkeypatch.setattr(
        flex_of_transformers, "WrappedFlexAttention", lambda _: lambda: flex_of_transformers.flex_attention
    )
    model = build("Mistral, window").train()
    forward = forward_of(model, "tree", torch.bfloat16)
    compile_layers(model)
    for layer in model.model.layers:
        layer._compiled_call_impl = counted(layer._call_impl)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    draw, seen = np.random.default_rng(0), []
    torch._dynamo.reset()
    graphs.clear()
    for _ in range(12):
        trees = [Tree([1] * int(draw.integers(1, 200)), ([1] * int(draw.integers(1, 200)),) * 2) for _ in range(3)]
        torch.cat([logps for tree in forward(trees) for logps in tree]).sum().backward()
        seen.append(len(graphs))
    assert seen[0] > 0
    assert seen[-1] == seen[4] <= 24
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_widths_on_a_gpu_are_few_and_hold_little_filling():
    cuda = torch.device("cuda")
    widths = {width_of(total, cuda) for total in range(1280, 16385)}
    assert all(width % 128 == 0 for width in widths)
    assert len(widths) <= 56
    assert max(1 - total / width_of(total, cuda) for total in range(1280, 16385)) <= 0.1
    assert width_of(1, cuda) == 128
