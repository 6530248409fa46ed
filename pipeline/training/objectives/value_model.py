"""The value model: what reward is still to come, read off every place of a sample that a token is predicted from.

PPO's critic. It has a reward model's layers and head, and is saved as one. It learns the returns of stored samples by squared
error; what it then says of samples is stored beside them (`pipeline.rollouts.values`), so that a policy learns without it in
memory.

Shapes: S samples of a pass, N tokens of all of them, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.forward.transfer import to_device
from pipeline.forward.values import Values, values_of
from pipeline.training.inputs.rollouts import Rollouts, Samples
from pipeline.training.objectives.advantages import token_returns
from pipeline.training.objectives.common import OfSamples
from pipeline.training.objectives.measured import Found, Measured, mean_over
from pipeline.training.objectives.reward_model import Classifier, has_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Returns:
    """What is known of a step before any forward pass: by the numbers of its samples the returns of their tokens, weights and
    rewards; how many samples and tokens it has, and the mean of the tokens' returns with their squared distance from it.
    """

    returns: Mapping[int, np.ndarray]
    weights: Mapping[int, float]
    rewards: Mapping[int, float]
    samples: int
    tokens: float
    mean: float
    spread: float


class ValueModel(OfSamples, Classifier):
    """See `pipeline.training.objectives.objective.Objective`; loaded and exported as a reward model is."""

    in_words = "as a value model"

    def load(
        self,
        base: Path,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        precision: torch.dtype,
        **options: Any,
    ) -> PreTrainedModel:
        """See `Objective.load`: a new head expects nothing, as returns may be of any size."""
        model = super().load(base, config, tokenizer, ends, precision, **options)
        if not has_head(base):
            torch.nn.init.zeros_(model.score.weight)
        return model

    def forward_of(
        self,
        model: PreTrainedModel,
        layout: str,
        precision: torch.dtype,
        device: torch.device | None = None,
        *,
        whole: bool = True,  # noqa: ARG002  # nothing is tried
    ) -> Values:
        """See `Objective.forward_of`."""
        return values_of(model, layout, precision, device)

    def whole(self, examples: Rollouts, rows: Sequence[int], train: TrainConfig) -> Returns:
        """See `Objective.whole`."""
        settings = train.policy_gradient
        step = examples.weighed(rows, settings)
        returns = token_returns(examples, step.numbers, settings)
        counted = [own for own, weight in zip(returns, step.weights, strict=True) if weight]
        every = np.concatenate(counted or [np.zeros(1)])
        return Returns(
            returns=dict(zip(step.numbers, returns, strict=True)),
            weights=dict(zip(step.numbers, step.weights.tolist(), strict=True)),
            rewards=dict(zip(step.numbers, examples.rewards[step.numbers].tolist(), strict=True)),
            samples=step.samples,
            tokens=step.tokens,
            mean=float(every.mean()),
            spread=float(((every - every.mean()) ** 2).sum()),
        )

    def measured(
        self,
        forward: Values,
        examples: Samples,
        group: Sequence[int],
        train: TrainConfig,  # noqa: ARG002  # the protocol's
        whole: Returns,
    ) -> Found:
        """See `Objective.measured`: the mean over the step's tokens of (V - return)^2."""
        branches = [tree[0] for tree in forward([examples.trees[number] for number in group])]
        values_N = torch.cat(branches).double()
        lengths = [len(values) for values in branches]

        def tensor(values: np.ndarray) -> torch.Tensor:
            return to_device(np.asarray(values, dtype=np.float64), values_N.device)

        sample_N = to_device(np.repeat(np.arange(len(group)), lengths), values_N.device)
        weights_N = tensor(np.repeat([whole.weights[number] for number in group], lengths))
        returns_N = tensor(np.concatenate([whole.returns[number] for number in group]))
        errors_N = weights_N * (values_N - returns_N) ** 2
        sums_S = torch.zeros(len(group), dtype=torch.float64, device=values_N.device).index_add(0, sample_N, errors_N)
        # the mean over the step's samples is the loss, whatever it is normalised by
        losses_S = sums_S * (whole.samples / whole.tokens)
        rewards = tensor(np.array([whole.rewards[number] for number in group]))
        return Found(
            losses_S,
            Measured(
                {
                    "loss": mean_over(losses_S),
                    "reward": mean_over(rewards),
                    "value/mean": mean_over(values_N, weights_N),
                    "value/explained_variance": _explained(errors_N, weights_N, returns_N, whole),
                }
            ),
        )


def _explained(
    errors_N: torch.Tensor, weights_N: torch.Tensor, returns_N: torch.Tensor, whole: Returns
) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - squared errors / squared distances of returns from their mean over the step, as a sum and a count that add up over its
    parts; without a count if all returns are equal.
    """
    varies = float(whole.spread > 0)
    distances = varies * (weights_N * (returns_N - whole.mean) ** 2).sum()
    return distances - varies * errors_N.detach().sum(), distances
