"""The oracle: scores with transformers, through the trainer's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import ReferenceConfig
from pipeline.forward import Tree, forward_of
from pipeline.hardware import device_kind
from pipeline.identity import Numerics
from pipeline.models import load_causal_lm
from pipeline.scoring import Request

_TOKENS_PER_BATCH = 2048


class TransformersScorer:
    """`Scorer` on transformers; see `pipeline.scoring.Scorer`."""

    def __init__(self, reference: ReferenceConfig, directory: Path, numerics: Numerics) -> None:
        model = load_causal_lm(directory, reference, getattr(torch, numerics.dtype)).to(device_kind()).eval()
        self._forward = forward_of(model, "separate")

    @torch.no_grad()
    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        found: list[np.ndarray] = [np.full(len(item.response_ids), np.nan, np.float32) for item in sequences]
        for batch in _batches(sequences):
            trees = [Tree(sequences[at].prompt_ids, (sequences[at].response_ids,)) for at in batch]
            for at, (logps,) in zip(batch, self._forward(trees), strict=True):
                found[at] = logps.float().cpu().numpy()
        return found


def _batches(sequences: Sequence[Request]) -> list[list[int]]:
    """Indices grouped by similar length, each group within the token budget once padded."""
    groups: list[list[int]] = []
    for at in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        width = len(sequences[at])
        if groups and width * (len(groups[-1]) + 1) <= _TOKENS_PER_BATCH:
            groups[-1].append(at)
        else:
            groups.append([at])
    return groups
