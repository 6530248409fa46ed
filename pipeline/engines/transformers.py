"""The oracle: scores with transformers, through the trainer's own forward pass, prompts read once.

Responses to one prompt are branches of one tree, so what the trainer computes at step 0 and what is stored here come from
the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request, TopTokens
from pipeline.engines.quarantine import computed
from pipeline.engines.sharing import siblings
from pipeline.forward.compiled import compile_layers
from pipeline.forward.logps import forward_of
from pipeline.forward.trees import Tree
from pipeline.models.load import load_causal_lm
from pipeline.store.identity import Numerics

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}


class TransformersScorer:
    """`Scorer` on transformers; see `pipeline.engines.protocol.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> None:  # noqa: ARG002  # as engines are made
        torch.set_float32_matmul_precision("highest")
        model = load_causal_lm(directory, reference, getattr(torch, numerics.dtype)).to(numerics.device).eval()
        self._forward = forward_of(model, "tree" if reference.share_prompts else "separate")
        if numerics.device == "cuda":
            compile_layers(model)
        self.batched_tokens = reference.max_batched_tokens or TOKENS_PER_BATCH[numerics.device]

    @torch.no_grad()
    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        scores = [np.full(len(item.response_ids), np.nan, np.float32) for item in sequences]
        for batch in batches(sequences, self.batched_tokens, self._forward.hidden.tokens):
            trees = [tree_of(sequences, part) for part in batch]
            for tree, branches in zip(batch, self._forward(trees), strict=True):
                for position, logps in zip(tree, branches, strict=True):
                    scores[position] = computed(logps.float().cpu().numpy())
        return scores

    @torch.no_grad()
    def top(self, sequences: Sequence[Request], count: int) -> list[TopTokens]:
        """See `Engine.top`."""
        found: list[TopTokens | None] = [None] * len(sequences)
        for batch in batches(sequences, self.batched_tokens, self._forward.hidden.tokens):
            trees = [tree_of(sequences, part) for part in batch]
            for tree, branches in zip(batch, self._forward.top(trees, count), strict=True):
                for position, (ids, logps) in zip(tree, branches, strict=True):
                    found[position] = TopTokens(ids.cpu().numpy().astype(np.int32), logps.float().cpu().numpy())
        return [top for top in found if top is not None]

    def close(self) -> None:
        """See `Scorer.close`."""
        del self._forward


def batches(
    sequences: Sequence[Request], budget: int, tokens: Callable[[Sequence[Tree]], int]
) -> list[list[list[int]]]:
    """Batches of trees, a tree being the places of sequences with one prompt; similar sizes together.

    A batch has at most `budget` of the tokens that `tokens` says are read for its trees, unless a single sequence has more.
    """
    cut = [part for group in siblings(sequences) for part in _cut(sequences, group, budget, tokens)]
    trees = [tree_of(sequences, part) for part in cut]
    sizes = [tokens([tree]) for tree in trees]
    groups: list[list[int]] = []
    for number in sorted(range(len(trees)), key=lambda number: -sizes[number]):
        if not groups or tokens([trees[position] for position in (*groups[-1], number)]) > budget:
            groups.append([])
        groups[-1].append(number)
    return [[cut[number] for number in group] for group in groups]


def tree_of(sequences: Sequence[Request], part: Sequence[int]) -> Tree:
    """The tree of sequences with one prompt, by their places."""
    return Tree(sequences[part[0]].prompt_ids, tuple(sequences[position].response_ids for position in part))


def _cut(
    sequences: Sequence[Request], group: list[int], budget: int, tokens: Callable[[Sequence[Tree]], int]
) -> Iterator[list[int]]:
    """The group in pieces whose trees fit the budget."""
    part: list[int] = []
    for position in group:
        if part and tokens([tree_of(sequences, [*part, position])]) > budget:
            yield part
            part = []
        part.append(position)
    yield part
