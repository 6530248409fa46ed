"""The preference objective: the policy's log-probabilities of both sides of a pair, beside the stored reference's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.config.losses import reference_free
from pipeline.config.training import TrainConfig
from pipeline.forward.logps import Forward
from pipeline.forward.transfer import to_device
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.objectives.common import CausalPolicy, OfPairs
from pipeline.training.objectives.losses import LossTerms, PairLogps, preference_loss, weighted_sums, wpo_weight
from pipeline.training.objectives.measured import Found, measured_pairs


class Preference(OfPairs, CausalPolicy):
    """See `pipeline.training.objectives.objective.Objective`."""

    in_words = "with preference optimization"

    def measured(
        self, forward: Forward, examples: Pairs, group: Sequence[int], train: TrainConfig, whole: float
    ) -> Found:
        """See `Objective.measured`."""
        terms, logps = self.terms(forward, examples, group, train, whole)
        return Found(terms.losses, measured_pairs(terms, logps.sums_2B), logps.sums_2B)

    def terms(
        self, forward: Forward, pairs: Pairs, group: Sequence[int], train: TrainConfig, mean_tokens: float
    ) -> tuple[LossTerms, PairLogps]:
        """Loss terms of the pairs of `group`, and their logps. `mean_tokens`: of the chosen side of the whole step."""
        logps = pair_logps(forward, pairs, group, train, mean_tokens)
        return preference_loss(logps, train), logps


def pair_logps(
    forward: Forward, pairs: Pairs, group: Sequence[int], train: TrainConfig, mean_tokens: float
) -> PairLogps:
    """The policy's log-probabilities of the pairs of `group`, beside the reference's; with gradients if they are on.

    `mean_tokens`: of the chosen side of the whole step.
    """
    trees = [pairs.trees[row] for row in group]
    if train.use_weighting:
        branches, squares = forward.aligned(trees)
        weights = [
            wpo_weight(logps[0].detach(), sums[0]) * wpo_weight(logps[1].detach(), sums[1])
            for logps, sums in zip(branches, squares, strict=True)
        ]
    else:
        branches = forward(trees)
        weights = [torch.ones((), dtype=torch.float64, device=branches[0][0].device) for _ in trees]
    device = weights[0].device
    if reference_free(train):
        reference = torch.zeros(2, len(trees), dtype=torch.float64)
    elif pairs.ref_sums:
        reference = torch.from_numpy(np.stack([pairs.ref_sums[row] for row in group], axis=1))
    else:
        stored = [
            [torch.tensor(side[row]) for side in (pairs.ref_chosen_token_logps, pairs.ref_rejected_token_logps)]
            for row in group
        ]
        reference = torch.stack([weighted_sums(logps, ld_alpha=train.ld_alpha) for logps in stored], dim=1)
    lengths = np.array([[len(branch) for branch in tree.branches] for tree in trees], dtype=np.float64)
    return PairLogps(
        torch.stack([weighted_sums(logps, ld_alpha=train.ld_alpha) for logps in branches], dim=1),
        to_device(reference.numpy(), device),
        torch.stack([weighted_sums(logps, ld_alpha=None) for logps in branches], dim=1),
        to_device(lengths, device).T,
        torch.stack(weights),
        mean_tokens,
        to_device(margins_of(pairs, group), device),
    )


def joined(parts: Sequence[PairLogps]) -> PairLogps:
    """Logps of several groups as one, in order."""
    tensors = [torch.cat(column, dim=-1) for column in list(zip(*parts, strict=True))[:5]]
    margins = [part.margins_B for part in parts if part.margins_B is not None]
    return PairLogps(
        tensors[0],
        tensors[1],
        tensors[2],
        tensors[3],
        tensors[4],
        parts[0].mean_chosen_tokens,
        torch.cat(margins) if margins else None,
    )


def margins_of(pairs: Pairs, group: Sequence[int]) -> np.ndarray:
    """How much better the chosen responses of `group` were scored, float64; zeros if nothing reads it."""
    return np.array([pairs.margins[row] if pairs.margins else 0.0 for row in group], dtype=np.float64)
