"""The output layer by itself: its values, its gradients, and what it holds in memory."""

import torch

from pipeline import products
from pipeline.output_layer import OutputLayer


def test_the_output_layer_multiplies_few_numbers_of_rows(monkeypatch):
    """oneDNN keeps code for each of them: a run over data of all lengths must not fill memory with it."""
    seen = set()
    linear = products.linear
    monkeypatch.setattr(products, "linear", lambda hidden, *rest: seen.add(len(hidden)) or linear(hidden, *rest))
    monkeypatch.setattr("pipeline.output_layer.LOGITS_BYTES", 4 * 11 * 150)
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

    monkeypatch.setattr("pipeline.output_layer.LOGITS_BYTES", 8 * 2**20)
    weight = torch.nn.Parameter(torch.randn(150_000, 8))
    hidden = torch.randn(400, 8, requires_grad=True)
    with Watch():
        OutputLayer(weight, None, 1.0, None).logps(hidden, torch.arange(400), torch.float32)[0].sum().backward()
    assert largest <= 8 * 2**20
