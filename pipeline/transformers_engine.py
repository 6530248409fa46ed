"""The oracle: scores with transformers, through the trainer's own forward pass, prompts read once.

Responses to one prompt are branches of one tree, so what the trainer computes at step 0 and what is stored here come from
the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import ReferenceConfig
from pipeline.forward import Tree, forward_of
from pipeline.hardware import device_kind
from pipeline.identity import Numerics
from pipeline.models import load_causal_lm
from pipeline.scoring import Request
from pipeline.sharing import siblings

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class TransformersScorer:
    """`Scorer` on transformers; see `pipeline.scoring.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics) -> None:
        model = load_causal_lm(directory, reference, getattr(torch, numerics.dtype)).to(device_kind()).eval()
        self._forward = forward_of(model, "tree" if reference.share_prompts else "separate")
        self.batched_tokens = reference.max_batched_tokens or _TOKENS_PER_BATCH[device_kind()]

    @torch.no_grad()
    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        found = [np.full(len(item.response_ids), np.nan, np.float32) for item in sequences]
        for batch in batches(sequences, self.batched_tokens):
            trees = [
                Tree(sequences[tree[0]].prompt_ids, tuple(sequences[at].response_ids for at in tree)) for tree in batch
            ]
            for tree, branches in zip(batch, self._forward(trees), strict=True):
                for at, logps in zip(tree, branches, strict=True):
                    found[at] = logps.float().cpu().numpy()
        return found

    def close(self) -> None:
        """See `Scorer.close`."""
        del self._forward


def batches(sequences: Sequence[Request], budget: int) -> list[list[list[int]]]:
    """Batches of trees, a tree being the places of sequences with one prompt; similar sizes together.

    A batch has at most `budget` tokens, unless a single sequence has more.
    """
    trees = [tree for group in siblings(sequences) for tree in _cut(sequences, group, budget)]
    sizes = [_tokens(sequences, tree) for tree in trees]
    groups: list[list[list[int]]] = []
    filled = 0
    for number in sorted(range(len(trees)), key=lambda number: -sizes[number]):
        if not groups or filled + sizes[number] > budget:
            groups.append([])
            filled = 0
        groups[-1].append(trees[number])
        filled += sizes[number]
    return groups


def _cut(sequences: Sequence[Request], group: list[int], budget: int) -> Iterator[list[int]]:
    """The group in pieces whose trees fit the budget."""
    tree: list[int] = []
    for at in group:
        if tree and _tokens(sequences, [*tree, at]) > budget:
            yield tree
            tree = []
        tree.append(at)
    yield tree


def _tokens(sequences: Sequence[Request], tree: Sequence[int]) -> int:
    return len(sequences[tree[0]].prompt_ids) + sum(len(sequences[at].response_ids) for at in tree)
