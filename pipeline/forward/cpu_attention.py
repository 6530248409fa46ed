"""Attention of packed trees on a CPU in bfloat16, by plain matrix products.

torch's fused attention is slow on short sequences, above all in its backward pass. The products below add up in float32,
so that scores are no less exact than the fused kernel's. The backward pass computes the probabilities again; nothing of the
size of a tree squared outlives a layer but the masks.

Shapes: T tokens of the pack, t tokens of a tree, b rows of a block, K key heads, G query heads to each, D size of a head
(values may have their own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# query rows per block; a block needs no keys after its own end, which saves up to half of the products
_BLOCK = 128


def attend(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    trees: Sequence[slice],
    biases: Sequence[torch.Tensor],
    scaling: float,
) -> torch.Tensor:
    """Attention output [1, T, K * G, D] of bfloat16 query [1, K * G, T, D], key and value [1, K, T, D]; zero outside of `trees`.

    `biases` are float32 [t, t], -inf where a tree's query (row) does not see a key; t may be rounded up, with rows that
    see anything.
    """
    attended: torch.Tensor = _Attention.apply(*operands, trees, biases, scaling)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return attended


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: Sequence[slice],
        biases: Sequence[torch.Tensor],
        scaling: float,
    ) -> torch.Tensor:
        out = value.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))
        with _float32_sums():
            for rows, bias_tt in zip(trees, biases, strict=True):
                query_KGtD = _of_tree(query, rows, bias_tt, key.shape[1])
                key_KtD, value_KtD = (_of_tree(side, rows, bias_tt) for side in (key, value))
                attended = torch.empty((*query_KGtD.shape[:3], value_KtD.shape[2]))
                for block in _blocks(bias_tt):
                    probabilities = _probabilities(query_KGtD, key_KtD, bias_tt, scaling, block)
                    attended[:, :, block] = _by_head(probabilities @ value_KtD[:, : block.stop], block)
                out[0, rows] = attended.flatten(0, 1)[:, : rows.stop - rows.start].transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.trees, ctx.biases, ctx.scaling = trees, biases, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        (gradient,) = gradients
        change = tuple(torch.zeros_like(side) for side in (query, key, value))
        with _float32_sums():
            for rows, bias_tt in zip(ctx.trees, ctx.biases, strict=True):
                query_KGtD, gradient_KGtD, out_KGtD = (
                    _of_tree(side, rows, bias_tt, key.shape[1])
                    for side in (query, gradient.transpose(1, 2), out.transpose(1, 2))
                )
                key_KtD, value_KtD = (_of_tree(side, rows, bias_tt) for side in (key, value))
                of_query = torch.empty_like(query_KGtD)
                of_key, of_value = torch.zeros_like(key_KtD), torch.zeros_like(value_KtD)
                for block in _blocks(bias_tt):
                    probabilities = _probabilities(query_KGtD, key_KtD, bias_tt, ctx.scaling, block)
                    slope = _rows(gradient_KGtD, block)
                    of_value[:, : block.stop].baddbmm_(probabilities.mT, slope)
                    # through softmax: p * (dp - sum_k p dp), where the sum is the output times its gradient
                    common = (slope * _rows(out_KGtD, block)).sum(-1, keepdim=True)
                    scores = (slope @ value_KtD[:, : block.stop].mT).sub_(common).mul_(probabilities).mul_(ctx.scaling)
                    of_query[:, :, block] = _by_head(scores @ key_KtD[:, : block.stop], block)
                    of_key[:, : block.stop].baddbmm_(scores.mT, _rows(query_KGtD, block))
                length = rows.stop - rows.start
                for whole, part in zip(change, (of_query.flatten(0, 1), of_key, of_value), strict=True):
                    whole[0, :, rows] = part[:, :length]
        return (*change, None, None, None)


def _of_tree(side: torch.Tensor, rows: slice, bias_tt: torch.Tensor, key_heads: int | None = None) -> torch.Tensor:
    """float32 [heads, t, D] of the tree at `rows`, zeros behind its end; [K, G, t, D] if `key_heads` are given."""
    filled = torch.zeros((side.shape[1], len(bias_tt), side.shape[3]))
    filled[:, : rows.stop - rows.start] = side[0, :, rows]
    return filled if key_heads is None else filled.view(key_heads, -1, *filled.shape[1:])


def _probabilities(
    query_KGtD: torch.Tensor, key_KtD: torch.Tensor, bias_tt: torch.Tensor, scaling: float, block: slice
) -> torch.Tensor:
    """float32 [K, G * b, keys up to the block's end]."""
    scores = _rows(query_KGtD, block) @ key_KtD[:, : block.stop].mT
    by_head = _by_head(scores, block)
    torch.add(bias_tt[block, : block.stop], by_head, alpha=scaling, out=by_head)
    return scores.softmax(-1)


def _rows(side_KGtD: torch.Tensor, block: slice) -> torch.Tensor:
    """[K, G * b, D]."""
    return side_KGtD[:, :, block].flatten(1, 2)


def _blocks(bias_tt: torch.Tensor) -> Iterator[slice]:
    for start in range(0, len(bias_tt), _BLOCK):
        yield slice(start, min(start + _BLOCK, len(bias_tt)))


def _by_head(tensor: torch.Tensor, block: slice) -> torch.Tensor:
    """The inverse of `_rows`: [K, G * b, any] to [K, G, b, any]."""
    return tensor.view(len(tensor), -1, block.stop - block.start, tensor.shape[2])


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Products of float32 matrices that oneDNN may read as bfloat16, but adds up and hands out in float32.

    Queries, keys, values and gradients are bfloat16 to begin with, so that nothing of them is lost.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's stubs lag behind its documentation
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
