"""The output layer by itself: its values, its gradients, and what it holds in memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.forward import cpu_products, output_layer
from pipeline.forward.output_layer import OutputLayer, output_layer_of


def test_the_output_layer_multiplies_few_numbers_of_rows(monkeypatch):
    """oneDNN keeps code for each of them: a run over data of all lengths must not fill memory with it."""
    seen = set()
    linear = cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda hidden, *rest: seen.add(len(hidden)) or linear(hidden, *rest))
    monkeypatch.setattr("pipeline.forward.output_layer.LOGITS_BYTES", 4 * 11 * 150)
    layer = OutputLayer(torch.nn.Parameter(torch.randn(11, 4)), None, 1.0, None)
    for tokens in range(1, 400, 7):
        hidden = torch.randn(tokens, 4, requires_grad=True)
        logps, _ = layer.logps(hidden, torch.zeros(tokens, dtype=torch.int64), torch.bfloat16)
        assert logps.shape == torch.autograd.grad(logps.sum(), hidden)[0].shape[:1] == (tokens,)
    # the last is the weight's gradient, with a row for each entry of the vocabulary
    assert seen == {64, 128, 150, 11}


def test_a_token_that_is_almost_sure_keeps_its_gradient():
    """1 - p is 0.0002 here, which bfloat16 cannot tell from nothing as a difference from 1."""
    weight = torch.nn.Parameter(torch.eye(4))
    hidden = torch.tensor([[9.0, 0.0, -1.0, -1.0]], requires_grad=True)
    for coarse in (torch.float32, torch.bfloat16):
        logps, _ = OutputLayer(weight, None, 1.0, None).logps(hidden, torch.tensor([0]), coarse)
        (gradient,) = torch.autograd.grad(logps.sum(), hidden)
        expected = torch.tensor([1.0, 0, 0, 0]) - hidden.detach()[0].softmax(0)
        torch.testing.assert_close(gradient[0], expected, atol=0, rtol=1e-2)


def test_a_soft_cap_is_derived_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(11, 4, generator=generator) * 3)
    bias = torch.nn.Parameter(torch.randn(11, generator=generator))
    hidden = torch.randn(6, 4, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 3, 10, 3, 5, 6])
    layer = OutputLayer(weight, bias, 0.7, 5.0)
    logits = 5.0 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 5.0)
    plain = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    grads = []
    for logps in (layer.logps(hidden, targets, torch.float32)[0], plain):
        grads.append(torch.autograd.grad((logps**2).sum(), (hidden, weight, bias)))
        torch.testing.assert_close(logps, plain)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_no_tensor_of_tokens_times_vocabulary_is_ever_alive(monkeypatch):
    """With 150,000 entries and 400 tokens the full logits would be 240 MB; the peak must stay near the chunk."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return result

    monkeypatch.setattr("pipeline.forward.output_layer.LOGITS_BYTES", 8 * 2**20)
    weight = torch.nn.Parameter(torch.randn(150_000, 8))
    hidden = torch.randn(400, 8, requires_grad=True)
    with Watch():
        OutputLayer(weight, None, 1.0, None).logps(hidden, torch.arange(400), torch.float32)[0].sum().backward()
    assert largest <= 8 * 2**20


@pytest.fixture
def _in_pieces(monkeypatch):
    """Chunks of 3 tokens and blocks of 4 entries: what is added up is added up several times."""
    monkeypatch.setattr(output_layer, "LOGITS_BYTES", 4 * 11 * 3)
    monkeypatch.setattr(output_layer, "_VOCABULARY_BLOCK", 4)


def made(dtype=torch.float32, *, bias=True, tokens=10):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(11, 4, generator=generator).to(dtype))
    bias = torch.nn.Parameter(torch.randn(11, generator=generator).to(dtype)) if bias else None
    hidden = torch.randn(tokens, 4, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, 11, (tokens,), generator=generator)


def plain(hidden, weight, bias, targets, factor, cap):
    logits = factor * torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logps = logits.log_softmax(1)
    return logits, logps.gather(1, targets[:, None])[:, 0], (2 * logps).logsumexp(1)


@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.3, None), (2.0, None), (1.0, 2.0), (0.3, 2.0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_in_pieces")
def test_values_and_gradients_in_pieces_are_those_of_the_whole(factor, cap, bias, dtype):
    hidden, weight, bias, targets = made(dtype, bias=bias)
    layer = OutputLayer(weight, bias, factor, cap)
    logits, logps, squares = plain(hidden, weight, bias, targets, factor, cap)
    torch.testing.assert_close(layer.logits(hidden), logits)
    assert layer.logits(hidden).dtype == torch.float32
    slopes = torch.linspace(-1, 2, 10)
    leaves = [one for one in (hidden, weight, bias) if one is not None]
    theirs = torch.autograd.grad(logps, leaves, slopes)
    for coarse in (torch.float32, torch.bfloat16):
        found, sums = layer.logps(hidden, targets, coarse, squares=True)
        torch.testing.assert_close(found, logps)
        torch.testing.assert_close(sums, squares)
        assert not sums.requires_grad
        mine = torch.autograd.grad(found, leaves, slopes)
        rough = torch.bfloat16 in (coarse, dtype)
        for ours, other in zip(mine, theirs, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, other, atol=5e-2 if rough else 1e-6, rtol=5e-2 if rough else 1e-5)
    assert layer.logps(hidden, targets, torch.float32)[1].shape == (0,)


@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_in_pieces")
def test_narrow_operands_give_wide_results_as_on_a_gpu(factor, cap, dtype, monkeypatch):
    """The operands are rounded, and nothing else: forward and backward."""
    monkeypatch.setattr(output_layer, "multiplies_narrow", lambda _: True)
    seen, product = [], output_layer.in_float32
    monkeypatch.setattr(
        output_layer, "in_float32", lambda a, b, kind: seen.append((a.dtype, b.dtype)) or product(a, b, kind)
    )
    hidden, weight, bias, targets = made(dtype)
    rounded = [side.detach().bfloat16().requires_grad_() for side in (hidden, weight)]
    logps, squares = plain(*rounded, bias, targets, factor, cap)[1:]
    found, sums = OutputLayer(weight, bias, factor, cap).logps(hidden, targets, torch.bfloat16, squares=True)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(found, logps, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sums, squares, atol=1e-6, rtol=1e-6)
    slopes = torch.linspace(-1, 2, 10)
    mine = torch.autograd.grad(found, [hidden, weight, bias], slopes)
    theirs = torch.autograd.grad(logps, [*rounded, bias], slopes)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), other.float(), atol=2e-2, rtol=2e-2)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


def test_a_gpu_in_float32_rounds_nothing(monkeypatch):
    monkeypatch.setattr(output_layer, "multiplies_narrow", lambda _: True)
    monkeypatch.setattr(output_layer, "in_float32", lambda *_: pytest.fail("rounded"))
    hidden, weight, bias, targets = made()
    found, _ = OutputLayer(weight, bias, 1.0, None).logps(hidden, targets, torch.float32)
    torch.testing.assert_close(found, plain(hidden, weight, bias, targets, 1.0, None)[1])


@pytest.mark.usefixtures("_in_pieces")
def test_a_gradient_of_many_chunks_is_summed_in_float32():
    """In bfloat16 the sum would stop growing: 256 + 1 is 256."""
    weight = torch.nn.Parameter(torch.zeros(11, 4, dtype=torch.bfloat16))
    bias = torch.nn.Parameter(torch.zeros(11, dtype=torch.bfloat16))
    hidden = torch.ones(3000, 4)
    targets = torch.zeros(3000, dtype=torch.int64)
    found, _ = OutputLayer(weight, bias, 1.0, None).logps(hidden, targets, torch.float32)
    for gradient in torch.autograd.grad(found.sum(), (weight, bias)):
        # 1 - 1/11 of each token
        assert gradient.flatten()[0].item() == pytest.approx(3000 * 10 / 11, rel=4e-3)


@pytest.mark.usefixtures("_in_pieces")
@pytest.mark.parametrize("learns", ["hidden", "weight", "bias"])
def test_only_gradients_that_are_wanted_are_computed(monkeypatch, learns):
    hidden, weight, bias, targets = made()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == learns)
    found, _ = OutputLayer(weight, bias, 1.0, None).logps(hidden, targets, torch.float32)
    calls, linear = [], cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda *sides: calls.append(1) or linear(*sides))
    (gradient,) = torch.autograd.grad(found.sum(), leaves[learns])
    (wanted,) = torch.autograd.grad(plain(hidden, weight, bias, targets, 1.0, None)[1].sum(), leaves[learns])
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)
    # four chunks: their logits again, then one product for the hidden states, or three blocks of the weight
    assert len(calls) == 4 * {"hidden": 2, "weight": 4, "bias": 1}[learns]


def test_a_vocabulary_larger_than_a_chunk_is_read_token_by_token(monkeypatch):
    monkeypatch.setattr(output_layer, "LOGITS_BYTES", 11)
    hidden, weight, bias, targets = made()
    seen, linear = [], cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda rows, *rest: seen.append(len(rows)) or linear(rows, *rest))
    found, _ = OutputLayer(weight, bias, 1.0, None).logps(hidden, targets, torch.float32)
    torch.testing.assert_close(found, plain(hidden, weight, bias, targets, 1.0, None)[1])
    assert seen == [1] * 10


FAMILIES = {
    "llama": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "phi": {},  # has a bias
}


def family(name, dtype=torch.float32):
    config = AutoConfig.for_model(
        name, vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.5, **FAMILIES[name],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_after_the_product_is_done_here(name):
    model = family(name).train()
    layer = output_layer_of(model)
    assert model.training
    ids = torch.arange(2, 9)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(layer.logits(hidden), model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert (layer.factor, layer.cap, layer.bias_V is not None) == {
        "llama": (1.0, None, False),
        "cohere": (0.3, None, False),
        "granite": (pytest.approx(1 / 3), None, False),
        "gemma2": (1.0, 2.0, False),
        "phi": (1.0, None, True),
    }[name]
    model.eval()
    output_layer_of(model)
    assert not model.training


@pytest.mark.parametrize(
    ("dtype", "off", "refused"),
    [
        (torch.float32, 1e-3, True),
        (torch.float32, 1e-6, False),
        (torch.bfloat16, 0.3, True),
        (torch.bfloat16, 1e-3, False),
    ],
)
def test_a_head_that_does_something_else_is_refused(dtype, off, refused):
    model = family("llama", dtype)
    forward = model.forward

    def altered(**inputs):
        found = forward(**inputs)
        # one logit of the last token alone, and only down
        found.logits[0, -1, 7] -= off * (found.logits.abs().max() + 1)
        return found

    model.forward = altered
    if refused:
        with pytest.raises(ConfigError, match="LlamaForCausalLM does something refscore does not know"):
            output_layer_of(model)
    else:
        output_layer_of(model)
