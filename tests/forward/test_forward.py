"""The forward pass against transformers' own, and its layouts against each other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.errors import ConfigError
from pipeline.forward import routes
from pipeline.forward.attention import Pack, as_attention_mask, attend
from pipeline.forward.logps import forward_of
from pipeline.forward.trees import Tree, merge, pack_trees

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
PLAIN = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen2, sliding window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "gemma": GemmaConfig(**SIZES),
    # caps so low and windows so short that both bite
    "gemma2": Gemma2Config(**SIZES, attn_logit_softcapping=0.5, final_logit_softcapping=2.0, sliding_window=3),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=3, layer_types=["sliding_attention", "full_attention"]),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, sliding_window=4, pad_token_id=0),
    "cohere": CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi": PhiConfig(**PLAIN),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
}
TREES = [
    Tree([5, 6, 7, 8], ([9, 10, 11], [9, 12])),
    Tree([3], ([4], [90, 91, 92, 93, 94])),
    Tree([20, 21, 22, 23, 24, 25, 26], ([1, 2], [1, 2, 3], [2])),
]


def build(config):
    torch.manual_seed(1)
    # eager is the architecture's definition; SDPA leaves Gemma 2's soft-cap out
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def oracle(model, trunk, branch):
    """A plain forward and cross-entropy on one sequence, with the attention that the architecture defines."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*trunk, *branch]])
    logits = model(input_ids=ids).logits[0, len(trunk) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, ids[0, len(trunk) :], reduction="none")


def flat(found):
    return torch.cat([logps for tree in found for logps in tree])


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("name", MODELS)
def test_logps_and_gradients_equal_a_plain_forward(name, layout):
    model = build(MODELS[name])
    ours = flat(forward_of(model, layout)(TREES))
    plain = torch.cat([oracle(model, tree.trunk, branch) for tree in TREES for branch in tree.branches])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 1, len(ours))
    grads = []
    for logps in (ours, plain):
        model.zero_grad()
        (logps * weights).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_no_branch_sees_another():
    model = build(MODELS["llama"])
    forward = forward_of(model, "tree")
    before = forward([Tree([5, 6], ([7, 8, 9], [10, 11]))])[0][1]
    after = forward([Tree([5, 6], ([50, 60, 70], [10, 11]))])[0][1]
    assert torch.equal(before, after)


def test_packing_and_order_of_trees_change_nothing():
    forward = forward_of(build(MODELS["llama"]), "tree")
    alone = [forward([tree])[0] for tree in TREES]
    for together in (forward(TREES), forward(TREES[::-1])[::-1]):
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), atol=1e-5, rtol=0)


def test_the_output_layer_runs_in_chunks_with_equal_results(monkeypatch):
    model = build(MODELS["llama"])
    whole = flat(forward_of(model, "tree")(TREES))
    monkeypatch.setattr("pipeline.forward.output_layer.LOGITS_BYTES", 4 * 97 * 3)
    torch.testing.assert_close(flat(forward_of(model, "tree")(TREES)), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "granite", "gemma"])
def test_bfloat16_products_give_the_same_gradients_but_for_their_digits(name):
    from pipeline.forward.output_layer import output_layer_of

    layer = output_layer_of(build(MODELS[name]))
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(50, 32, generator=generator), torch.randint(97, (50,), generator=generator)
    found = []
    for coarse in (torch.float32, torch.bfloat16):
        leaf = hidden.clone().requires_grad_()
        layer.weight_VH.grad = None
        logps, _ = layer.logps(leaf, targets, coarse)
        (logps * torch.linspace(-1, 1, 50)).sum().backward()
        found.append((logps.detach(), leaf.grad, layer.weight_VH.grad.clone()))
    # the values themselves are float32 in both
    assert torch.equal(found[0][0], found[1][0])
    for exact, coarse in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0) > 0.9995


def test_an_output_layer_that_does_more_is_refused():
    model = build(MODELS["llama"])
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden) * 1.5
    with pytest.raises(ConfigError, match="not supported"):
        forward_of(model, "tree")


def test_layers_that_cannot_be_masked_go_to_padded_sequences_and_the_log_says_so(caplog):
    model = build(
        FalconMambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    )
    ours = flat(forward_of(model, "tree")(TREES))
    assert "separate padded sequences" in caplog.text
    assert "falcon_mamba" in caplog.text
    plain = torch.cat([oracle(model, tree.trunk, branch) for tree in TREES for branch in tree.branches])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_listed_architecture_is_packed(name, dtype, caplog):
    forward_of(build(MODELS[name]).to(dtype), "tree")
    assert not caplog.text


def see_everything(pack, window):
    return lambda batch, head, q, k: (pack.tree_T[q] == pack.tree_T[k]) & (k <= q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("broken", ["masks", "positions"])
def test_a_model_that_gets_a_mask_or_positions_wrong_is_not_packed(name, dtype, broken, monkeypatch, caplog):
    if broken == "masks":
        monkeypatch.setattr(Pack, "may_see", see_everything)
    else:
        kind = type(build(MODELS[name]).base_model)
        forward = kind.forward

        def without_positions(self, *given, position_ids=None, **named):
            return forward(self, *given, **named)

        monkeypatch.setattr(kind, "forward", without_positions)
    forward_of(build(MODELS[name]).to(dtype), "tree")
    assert "does not follow the mask of a tree" in caplog.text


def test_trees_of_one_prompt_share_its_trunk_and_equal_branches_are_read_once(monkeypatch):
    apart = [Tree([5, 6, 7], ([1, 2], [3])), Tree([8], ([1], [2])), Tree([5, 6, 7], ([3], [4, 5, 6], [1, 2]))]
    merged, places = merge(apart)
    assert merged == [Tree((5, 6, 7), ((1, 2), (3,), (4, 5, 6))), Tree((8,), ((1,), (2,)))]
    assert places == [[0, 1], [3, 4], [1, 2, 0]]
    model = build(MODELS["llama"])
    forward = forward_of(model, "tree")
    monkeypatch.setattr("pipeline.forward.trees._WIDTH", {})
    read = []
    embed = model.base_model.embed_tokens.forward
    monkeypatch.setattr(model.base_model.embed_tokens, "forward", lambda ids: read.append(ids.numel()) or embed(ids))
    together = forward(apart)
    # the trunk once, and branches without their last tokens
    assert read == [3 + 1 + 0 + 2 + 1 + 0 + 0]
    for tree, found in zip(apart, together, strict=True):
        for branch, logps in zip(tree.branches, found, strict=True):
            torch.testing.assert_close(logps, oracle(model, tree.trunk, branch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
def test_the_block_mask_of_a_gpu_hides_what_the_dense_masks_hide(window):
    """FlexAttention's mask function over a whole padded pack, position by position, against the masks of single trees."""
    trees = [TREES[0], Tree([3, 4, 5], ([1, 2, 3, 4, 5],)), TREES[2]]
    _, pack, _ = pack_trees(trees, torch.device("cpu"))
    padded = Pack(
        *(torch.nn.functional.pad(side, (0, 5), value=value) for side, value in
          ((pack.tree_T, 3), (pack.branch_T, -1), (pack.positions_T, 0))),
        pack.trees, pack.branches,
    )  # fmt: skip
    every = torch.arange(len(padded.tree_T))
    seen = padded.may_see(window)(0, 0, every[:, None], every[None, :])
    expected = torch.zeros_like(seen)
    for number, where in enumerate(pack.trees):
        size = where.stop - where.start
        mask = pack.dense_mask(number, window, size)
        expected[where, where] = torch.ones(size, size, dtype=torch.bool).tril() if mask is None else mask
    real = padded.branch_T >= 0
    assert torch.equal(seen[real], expected[real])
    # and nobody sees what only fills
    assert not seen[real][:, ~real].any()
    # a row that sees nothing would be NaN in a softmax
    assert seen.any(1).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_the_dense_masks_give():
    from torch.nn.attention.flex_attention import flex_attention

    _, pack, _ = pack_trees(TREES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, len(pack.tree_T), 16, generator=generator) for _ in range(3))
    ours = attend(torch.nn.Identity(), query, key, value, as_attention_mask(pack), sliding_window=4)[0].transpose(1, 2)
    theirs = flex_attention(query, key, value, block_mask=pack.block_mask(4))
    real = pack.branch_T >= 0
    torch.testing.assert_close(ours[:, :, real], theirs[:, :, real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("weights", "precision", "used"),
    [
        (torch.float32, torch.float32, []),
        (torch.float32, torch.bfloat16, [(torch.float32, True)]),
        (torch.bfloat16, torch.bfloat16, [(torch.bfloat16, True)]),
        (torch.bfloat16, torch.float32, [(torch.bfloat16, False)]),
    ],
)
def test_a_way_of_reading_is_tried_in_the_arithmetic_of_training_too(weights, precision, used):
    """Kernels for other dtypes are other kernels."""
    modes = routes._modes(build(MODELS["llama"]).to(weights), precision, torch.device("cpu"))
    assert [(mode.weights, mode.autocast) for mode in modes] == [(torch.float32, False), *used]


def test_terms_that_an_attention_adds_are_never_left_out():
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="adds terms"):
        attend(torch.nn.Identity(), query, query, query, None, position_bias=torch.zeros(2))
