"""What an objective finds in some examples: their losses, and what is written down of them as means over a step.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from pipeline.training.inputs.batches import Examples
from pipeline.training.objectives.losses import LossTerms

# a sum, and over how much it is: float64 scalars without gradient
Mean = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Under names of METRICS: means, as a sum and its count each, so that parts of a step add up; and what is highest."""

    means: Mapping[str, Mean]
    highest: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Found(NamedTuple):
    """Losses [B], whose mean over a step is its loss, what was measured, and the policy's sums [2, B] of a pair's two sides,
    float64, if there are pairs.
    """

    losses: torch.Tensor
    measured: Measured
    sums_2B: torch.Tensor | None = None


def mean_over(values: torch.Tensor, weights: torch.Tensor | None = None) -> Mean:
    """The mean of `values`, by `weights` if they are given, as a sum and its count."""
    values = values.detach().double()
    if weights is None:
        return values.sum(), torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
    weights = weights.double()
    # a value that does not count may be none at all
    return torch.where(weights > 0, values * weights, 0.0).sum(), weights.sum()


def measured_pairs(terms: LossTerms, sums_2B: torch.Tensor | None) -> Measured:
    """TRAIN_METRICS of pairs, or of what is best and worst in lists; a reward model has no sums of log-probabilities."""
    margins = terms.chosen_rewards - terms.rejected_rewards
    values = {
        "loss": terms.losses,
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }
    if sums_2B is not None:
        values |= {"logps/chosen": sums_2B[0], "logps/rejected": sums_2B[1]}
    return Measured({name: mean_over(value) for name, value in values.items()})


def mean_chosen_tokens(examples: Examples, rows: Sequence[int]) -> float:
    """Mean length of the first response of `rows`, which of pairs is the chosen one."""
    return float(np.mean([len(examples.trees[row].branches[0]) for row in rows]))
