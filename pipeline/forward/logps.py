"""Response logps of trees under a model: the one forward pass of trainer, gate, oracle engine and implicit judge.

Trees (`pipeline.forward.trees`) are packed into one sequence: the trunk is read once, positions of every branch go on where the
trunk ends, and no branch sees another (`pipeline.forward.attention`). The `separate` layout is the same code on trees of one
branch. Architectures for which a pack does not give what each sequence gives alone are read in another way, with equal results
(`pipeline.forward.routes`).

Only response positions reach the output layer (`pipeline.forward.output_layer`).

Shapes: N scored tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.forward.cpu_products import FastProducts
from pipeline.forward.output_layer import OutputLayer, output_layer_of
from pipeline.forward.routes import route_of
from pipeline.forward.transfer import to_device
from pipeline.forward.trees import Tree, merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# for each tree and branch a float32 tensor with one value per response token
PerToken = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Hidden:
    """From trees without equal trunks or branches to the hidden states [N, H] that predict the branches' tokens, in their
    order; and how many tokens the model reads for them.
    """

    of: Callable[[Sequence[Tree]], torch.Tensor]
    tokens: Callable[[Sequence[Tree]], int]


@dataclass(frozen=True)
class Forward:
    """A function from trees to logps: for each tree and branch a float32 tensor with one value per response token."""

    hidden: Hidden
    layer: OutputLayer
    precision: torch.dtype

    def __call__(self, trees: Sequence[Tree]) -> PerToken:
        """Logps of every branch of every tree."""
        return self.aligned(trees, squares=False)[0]

    def top(self, trees: Sequence[Tree], count: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """For each tree and branch ids and logps, both [tokens, count], of the likeliest tokens where its tokens stand."""
        merged, places = merge(trees)
        ids_NK, logps_NK = self.layer.top(self.hidden.of(merged), count)
        lengths = [len(branch) for tree in merged for branch in tree.branches]
        flat = list(zip(torch.split(ids_NK, lengths), torch.split(logps_NK, lengths), strict=True))
        return [[flat[place] for place in tree] for tree in places]

    def tokens(self, trees: Sequence[Tree]) -> int:
        """Tokens that the model reads for `trees`, filling of batches included."""
        return self.hidden.tokens(merge(trees)[0])

    def aligned(self, trees: Sequence[Tree], *, squares: bool = True) -> tuple[PerToken, PerToken]:
        """Logps, and beside each the logarithm of the sum of all tokens' squared probabilities there (no gradient)."""
        merged, places = merge(trees)
        branches = [branch for tree in merged for branch in tree.branches]
        targets = np.concatenate([np.asarray(branch, dtype=np.int64) for branch in branches])
        hidden_NH = self.hidden.of(merged)
        targets_N = to_device(targets, hidden_NH.device)
        logps_N, squares_N = self.layer.logps(hidden_NH, targets_N, self.precision, squares=squares)
        lengths = [len(branch) for branch in branches]
        flat = [torch.split(values, lengths) if len(values) else [] for values in (logps_N, squares_N)]
        logps, sums = ([[values[place] for place in tree] for tree in places] if values else [] for values in flat)
        return logps, sums


def forward_of(
    model: PreTrainedModel,
    layout: str,
    precision: torch.dtype = torch.float32,
    device: torch.device | None = None,
    *,
    whole: bool = True,
) -> Forward:
    """The forward pass of a causal language model over trees: for each tree and branch float32 [len(branch)], in nats.

    `layout`: "tree" reads a prompt once for its responses, "separate" once per response. `precision` bfloat16 runs the
    layers (not the logits) under autocast. `device`: where it will run, if that is not where the model lies now. Raises
    ConfigError if the model's output layer does something that is not reproduced here, which can be seen if it is `whole`.
    """
    return Forward(hidden_states_of(model, layout, precision, device), output_layer_of(model, checked=whole), precision)


def hidden_states_of(
    model: PreTrainedModel, layout: str, precision: torch.dtype, device: torch.device | None = None
) -> Hidden:
    """The hidden states of merged trees under `layout` (tree, separate); says in the log if they are not packed whole."""
    device = device or next(model.parameters()).device

    def arithmetic() -> AbstractContextManager[object]:
        if precision == torch.bfloat16:
            return torch.autocast(device.type, torch.bfloat16)
        return FastProducts() if device.type == "cpu" else nullcontext()

    route = route_of(model, precision, device)
    if route.why:
        ways = {
            "packed": "longer sequences each alone",
            "padded": "separate padded sequences",
            "alone": "every sequence alone",
        }
        log.warning("layout: %s, as %s", ways[route.kind], route.why)
        if device.type != "cpu" and route.kind != "packed":
            log.warning("layout: prompts are read once per response, without FlexAttention: slower, and more memory")

    def hidden_of(trees: Sequence[Tree]) -> torch.Tensor:
        with arithmetic():
            return route.hidden(model, trees, tree=layout == "tree")

    return Hidden(hidden_of, lambda trees: route.tokens(trees, tree=layout == "tree"))
