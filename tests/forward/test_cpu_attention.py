"""Attention by plain products, and its gradients, against attention in float64 and the exactness of torch's own kernel."""

import pytest
import torch

from pipeline.forward import cpu_attention


def inputs(heads, key_heads, tokens, size=16):
    """Query, key, value with a head size of its own, gradient; of a scale at which scores reach 30, as large models' do."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, tokens, 16), (key_heads, tokens, 16), (key_heads, tokens, size), (heads, tokens, size))
    return [torch.randn(1, *shape, generator=generator).mul(2.5).bfloat16() for shape in shapes]


def bias(length, size, branch_from):
    """Causal, but rows of the last third do not see the middle third; rows behind `length` see the first key."""
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    seen[2 * branch_from :, branch_from : 2 * branch_from] = False
    seen[length:] = False
    seen[length:, 0] = True
    return torch.zeros(size, size).masked_fill(~seen, float("-inf"))


def exact(query, key, value, trees, biases, scaling):
    """The definition, in the digits of its inputs: [1, T, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    for rows, added in zip(trees, biases, strict=True):
        length = rows.stop - rows.start
        scores = query[:, :, rows] @ key[:, :, rows].mT * scaling + added[:length, :length]
        out[:, :, rows] = scores.softmax(-1) @ value[:, :, rows]
    return out.transpose(1, 2)


def fused(query, key, value, trees, biases, scaling):
    """torch's own attention kernel, tree by tree."""
    groups = query.shape[1] // key.shape[1]
    key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    for rows, added in zip(trees, biases, strict=True):
        seen = added[: rows.stop - rows.start, : rows.stop - rows.start] == 0
        out[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], attn_mask=seen, scale=scaling
        )
    return out.transpose(1, 2)


def error(found, expected):
    return float(torch.linalg.norm(found.detach().double() - expected.detach()) / torch.linalg.norm(expected.detach()))


# lengths on both sides of a block of 128 rows, of two, and far below
@pytest.mark.parametrize("lengths", [[5], [127, 3], [128, 129], [300, 40, 257]])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 4, 16), (6, 2, 16), (4, 2, 24)])
def test_outputs_and_gradients_are_no_less_exact_than_torchs(heads, key_heads, size, lengths):
    trees, biases, start = [], [], 2
    for length in lengths:
        trees.append(slice(start, start + length))
        biases.append(bias(length, -(-length // 32) * 32, max(1, length // 3)))
        start += length
    *sides, gradient = inputs(heads, key_heads, start + 7, size)
    results = []
    for attention, dtype in (
        (lambda *given: cpu_attention.attend(given[:3], *given[3:]), torch.bfloat16),
        (fused, torch.bfloat16),
        (exact, torch.float64),
    ):
        leaves = [side.to(dtype).requires_grad_() for side in sides]
        out = attention(*leaves, trees, biases, 0.3)
        results.append((out, *torch.autograd.grad(out, leaves, gradient.transpose(1, 2).to(dtype))))
    ours, torchs, expected = results
    for mine, theirs, right in zip(ours, torchs, expected, strict=True):
        assert error(mine, right) < 0.02
        # with head sizes that differ torch computes everything in float32
        assert size != 16 or error(mine, right) < 1.1 * error(theirs, right)
    outside = torch.ones(start + 7, dtype=torch.bool)
    outside[2:start] = False
    assert not ours[0][0, outside].any()
    assert not any(side[0, :, outside].any() for side in ours[1:])


def test_no_row_depends_on_what_it_does_not_see():
    query, key, value, _ = inputs(2, 2, 90)
    added = [bias(90, 96, 30)]
    before = cpu_attention.attend((query, key, value), [slice(0, 90)], added, 0.25)
    key[:, :, 30:60], value[:, :, 30:60] = 7.0, -7.0
    after = cpu_attention.attend((query, key, value), [slice(0, 90)], added, 0.25)
    assert torch.equal(before[0, :30], after[0, :30])
    assert torch.equal(before[0, 60:], after[0, 60:])
    assert not torch.equal(before[0, 30:60], after[0, 30:60])


def test_torch_computes_as_before_afterwards():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    query, key, value, _ = inputs(2, 2, 8)
    cpu_attention.attend((query, key, value), [slice(0, 8)], [bias(8, 32, 3)], 0.25)
    assert matmul.fp32_precision == before
    with pytest.raises(RuntimeError):
        cpu_attention.attend((query, key[..., :3], value), [slice(0, 8)], [bias(8, 32, 3)], 0.25)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize(("trees", "biases"), [(2, 1), (1, 2)])
def test_a_tree_without_its_bias_is_refused_and_not_left_at_zero(trees, biases):
    query, key, value, _ = inputs(2, 2, 8)
    slices = [slice(0, 4), slice(4, 8)]
    with pytest.raises(ValueError):
        cpu_attention.attend((query, key, value), slices[:trees], [bias(4, 4, 1)] * biases, 0.25)
