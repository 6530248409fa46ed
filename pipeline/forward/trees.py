"""Trees of token ids and how they are laid into one sequence: a prompt (trunk) and the responses to it (branches).

Trees with the same trunk are merged, and equal branches read once. Packed, the trunk stands once, positions of every branch go
on where the trunk ends. The last token of a branch predicts nothing and is left out.

Shapes: T tokens of a pack, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.forward.attention import Pack
from pipeline.forward.transfer import to_device

# Widths of packs are multiples of this, so that they are few: on CPU blocks of memory fit again that an earlier pack has freed
_WIDTH = {"cuda": 128, "cpu": 128}


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt, the trunk, and of the responses to it, the branches; no branch sees another."""

    trunk: Sequence[int]
    branches: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Tokens of the laid-out sequence; the last token of a branch predicts nothing and is left out."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in it, a prompt with one response to its last token."""
        return len(self.trunk) + max(map(len, self.branches))


def merge(trees: Sequence[Tree]) -> tuple[list[Tree], list[list[int]]]:
    """Trees with every trunk once and every branch of it once; for each given tree and branch its number among the
    merged trees' branches, counted through.
    """
    branches: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for tree in trees:
        seen = branches.setdefault(tuple(tree.trunk), {})
        for branch in tree.branches:
            seen.setdefault(tuple(branch), len(seen))
    starts, count = {}, 0
    for trunk, seen in branches.items():
        starts[trunk] = count
        count += len(seen)
    places = []
    for tree in trees:
        trunk = tuple(tree.trunk)
        places.append([starts[trunk] + branches[trunk][tuple(branch)] for branch in tree.branches])
    return [Tree(trunk, tuple(seen)) for trunk, seen in branches.items()], places


def pack_trees(trees: Sequence[Tree], device: torch.device) -> tuple[torch.Tensor, Pack, torch.Tensor]:
    """Token ids [T], the pack, and the positions [N] whose hidden states predict the branches' tokens."""
    total = sum(map(len, trees))
    width = width_of(total, device)
    ids, positions, number_of = (np.zeros(width, dtype=np.int64) for _ in range(3))
    branch_of = np.full(width, -1, dtype=np.int64)
    rows, slices, start = [], [], 0
    places: list[list[slice]] = []
    for number, tree in enumerate(trees):
        first, end = start, start + len(tree.trunk)
        ids[first:end], branch_of[first:end], positions[first:end] = tree.trunk, 0, np.arange(end - first)
        start = end
        places.append([])
        for branch_number, branch in enumerate(tree.branches, start=1):
            inner = len(branch) - 1
            ids[start : start + inner], branch_of[start : start + inner] = branch[:-1], branch_number
            positions[start : start + inner] = np.arange(end - first, end - first + inner)
            # the trunk's last position predicts the first token of every branch
            rows.append(np.concatenate([[end - 1], np.arange(start, start + inner)]))
            places[-1].append(slice(start, start + inner))
            start += inner
        number_of[first:start] = number
        slices.append(slice(first, start))
    # padding at the end sees padding only, and is in no tree's slice
    number_of[total:] = len(trees)
    tree_T, branch_T, positions_T = (to_device(values, device) for values in (number_of, branch_of, positions))
    pack = Pack(tree_T, branch_T, positions_T, slices, places)
    return to_device(ids, device), pack, to_device(np.concatenate(rows), device)


def width_of(total: int, device: torch.device) -> int:
    """Tokens that a pack of `total` tokens is filled up to: few widths, as a GPU compiles a kernel for each, and from 1,280
    tokens on at most a tenth of filling.
    """
    step = _WIDTH.get(device.type, 1)
    if device.type == "cuda":
        step = max(step, 2 ** (total.bit_length() - 5))
    return -(-total // step) * step


def separated(trees: Sequence[Tree]) -> list[Tree]:
    return [Tree(tree.trunk, (branch,)) for tree in trees for branch in tree.branches]
