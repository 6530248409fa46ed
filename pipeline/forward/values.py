"""Values of trees under a critic: one score for every place from which a token of a response is predicted.

The value of a token is that of the state before it, so of the prompt with the tokens of the response that precede it. The hidden
states are those from which a policy's log-probabilities are read (`pipeline.forward.logps`).

Shapes: N response tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.forward.logps import Hidden, PerToken, hidden_states_of
from pipeline.forward.trees import Tree, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Values:
    """A function from trees to values: for each tree and branch a float32 tensor with one value per response token."""

    hidden: Hidden
    head: torch.nn.Module

    def __call__(self, trees: Sequence[Tree]) -> PerToken:
        """Values of every token of every branch of every tree."""
        merged, places = merge(trees)
        hidden_NH = self.hidden.of(merged)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            values_N = self.head(hidden_NH.float())[:, 0]
        flat = torch.split(values_N, [len(branch) for tree in merged for branch in tree.branches])
        return [[flat[place] for place in tree] for tree in places]

    def tokens(self, trees: Sequence[Tree]) -> int:
        """Tokens that the model reads for `trees`, filling of batches included."""
        return self.hidden.tokens(merge(trees)[0])


def values_of(
    model: PreTrainedModel, layout: str, precision: torch.dtype, device: torch.device | None = None
) -> Values:
    """The values of a one-label sequence classifier, whose head is float32; arguments as of `forward_of`."""
    return Values(hidden_states_of(model, layout, precision, device), model.score)
