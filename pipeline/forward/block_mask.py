"""FlexAttention's block mask of a pack, made from the places of its trees instead of from a [T, T] mask.

A mask of every token by every token takes a GiB at 12,000 tokens, while what a pack shows is a few rectangles: a trunk or a
branch sees itself up to each token, a branch sees its whole trunk, and a window cuts off what lies too far behind. Blocks of
128 by 128 tokens are asked which of these rectangles they overlap, and whether wholly.

Shapes: T tokens of the pack, n = ceil(T / 128) blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.forward.transfer import to_device

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class Rectangle(NamedTuple):
    """Queries that may see keys: token q sees token k if 0 <= q - k + `shift`, its distance in positions, and it is within
    the window.
    """

    queries: slice
    keys: slice
    shift: int


def rectangles(trees: Sequence[slice], branches: Sequence[Sequence[slice]], total: int) -> Iterator[Rectangle]:
    """What the tokens of a pack may see. `trees` and `branches`: their places; behind the last tree stands filling, up to
    `total`, which sees itself.
    """
    for tree, of_tree in zip(trees, branches, strict=True):
        trunk = slice(tree.start, of_tree[0].start if of_tree else tree.stop)
        yield Rectangle(trunk, trunk, 0)
        for branch in of_tree:
            yield Rectangle(branch, trunk, trunk.stop - branch.start)
            yield Rectangle(branch, branch, 0)
    filling = slice(trees[-1].stop if trees else 0, total)
    yield Rectangle(filling, filling, 0)


def visible_blocks(parts: Iterator[Rectangle], total: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Boolean [n, n]: blocks of queries that see something of a block of keys, and those that see all of it."""
    number = -(-total // BLOCK)
    some, seen = np.zeros((number, number), dtype=bool), np.zeros((number, number), dtype=np.int64)
    farthest = total if window is None else window
    for queries, keys, shift in parts:
        if queries.start >= queries.stop or keys.start >= keys.stop:
            continue
        rows, first_q, last_q = _overlaps(queries)
        columns, first_k, last_k = _overlaps(keys)
        nearest = first_q[:, None] - last_k[None, :] + shift
        distance = last_q[:, None] - first_k[None, :] + shift
        some[rows, columns] |= (distance >= 0) & (nearest < farthest)
        tokens = (last_q - first_q + 1)[:, None] * (last_k - first_k + 1)[None, :]
        # what is seen in part counts for nothing: such a block is not seen whole
        seen[rows, columns] += tokens * ((nearest >= 0) & (distance < farthest))
    return some, seen == BLOCK * BLOCK


def block_mask_of(
    parts: Iterator[Rectangle],
    total: int,
    window: int | None,
    may_see: Callable[..., torch.Tensor],
    device: torch.device,
) -> BlockMask:
    """The block mask on `device`; `may_see` decides within blocks that are seen in part, as FlexAttention's mask_mod."""
    from torch.nn.attention.flex_attention import BlockMask

    some, whole = visible_blocks(parts, total, window)
    partial_counts, partial_numbers = _listed(some & ~whole, device)
    counts, numbers = _listed(whole, device)
    return BlockMask.from_kv_blocks(
        partial_counts, partial_numbers, counts, numbers, BLOCK, mask_mod=may_see, seq_lengths=(total, total)
    )


def _overlaps(tokens: slice) -> tuple[slice, np.ndarray, np.ndarray]:
    """Blocks that `tokens` overlap, and the first and last of the tokens in each."""
    blocks = np.arange(tokens.start // BLOCK, -(-tokens.stop // BLOCK))
    first, last = np.maximum(blocks * BLOCK, tokens.start), np.minimum((blocks + 1) * BLOCK, tokens.stop) - 1
    return slice(int(blocks[0]), int(blocks[-1]) + 1), first, last


def _listed(seen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int32: how many blocks each row of blocks sees [1, 1, n], and their numbers, those first [1, 1, n, n]."""
    counts, numbers = seen.sum(1, dtype=np.int32), np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    return to_device(counts, device)[None, None], to_device(numbers, device)[None, None]
