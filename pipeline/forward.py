"""Response logps of trees under a model: the one forward pass of trainer, gate, oracle engine and implicit judge.

A tree is a prompt (trunk) and the responses to it (branches). Laid out as one sequence [trunk | branch | branch | ...],
the trunk is read once: positions of every branch go on where the trunk ends, and no branch sees another. A tree with one
branch is an ordinary causal sequence, so the `separate` layout is the same code on single-branch trees.

Only response positions reach the output layer (`pipeline.output_layer`).

Shapes: B sequences of a batch, T their padded length, N scored tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.output_layer import output_layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt and of the responses to it."""

    trunk: Sequence[int]
    branches: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Tokens of the laid-out sequence; the last token of a branch predicts nothing and is left out."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)


Forward = Callable[[Sequence[Tree]], list[list[torch.Tensor]]]


def forward_of(model: PreTrainedModel, layout: str, precision: torch.dtype = torch.float32) -> Forward:
    """A function from trees to logps: for each tree and branch a float32 tensor with one value per response token.

    `precision` bfloat16 runs the layers (not the logits) under autocast. Raises ConfigError where the model's output
    layer does something that is not reproduced here.
    """
    if layout == "tree" and (reason := _why_not_trees(model)):
        log.warning("layout: separate sequences instead of trees, as %s", reason)
        layout = "separate"
    layer = output_layer_of(model)
    device = next(model.parameters()).device

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if precision == torch.bfloat16 else nullcontext()

    def forward(trees: Sequence[Tree]) -> list[list[torch.Tensor]]:
        laid = (
            trees if layout == "tree" else [Tree(tree.trunk, (branch,)) for tree in trees for branch in tree.branches]
        )
        batch = _lay_out(laid, device)
        with autocast():
            hidden_BTH = model.base_model(
                input_ids=batch.ids_BT,
                attention_mask=_as_model_wants(model, batch.mask_BTT, precision),
                position_ids=batch.positions_BT,
                use_cache=False,
            ).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)[batch.rows_N]
        logps_N = layer.logps(hidden_NH, batch.targets_N, precision)
        flat = iter(torch.split(logps_N, [len(branch) for tree in trees for branch in tree.branches]))
        return [[next(flat) for _ in tree.branches] for tree in trees]

    return forward


# --- layout


@dataclass(frozen=True)
class _Batch:
    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_BTT: torch.Tensor | None  # True = may look; None = plain causal
    rows_N: torch.Tensor  # flat positions whose hidden state predicts a response token
    targets_N: torch.Tensor


def _lay_out(trees: Sequence[Tree], device: torch.device) -> _Batch:
    width = max(map(len, trees))
    ids = np.zeros((len(trees), width), dtype=np.int64)
    positions = np.zeros((len(trees), width), dtype=np.int64)
    # which branch a position belongs to: 0 the trunk, 1.. the branches, -1 padding
    owner = np.full((len(trees), width), -1, dtype=np.int64)
    rows, targets = [], []
    for number, tree in enumerate(trees):
        end = len(tree.trunk)
        ids[number, :end], positions[number, :end], owner[number, :end] = tree.trunk, np.arange(end), 0
        start = end
        for which, branch in enumerate(tree.branches, start=1):
            inner = len(branch) - 1
            ids[number, start : start + inner] = branch[:-1]
            positions[number, start : start + inner] = np.arange(end, end + inner)
            owner[number, start : start + inner] = which
            # the trunk's last position predicts the first token of every branch
            rows.append(number * width + np.concatenate([[end - 1], np.arange(start, start + inner)]))
            targets.append(np.asarray(branch, dtype=np.int64))
            start += inner
    mask = None
    if any(len(tree.branches) > 1 for tree in trees):
        owner_t = torch.from_numpy(owner).to(device)
        seen, sees = owner_t[:, None, :], owner_t[:, :, None]
        mask = ((seen == 0) | (seen == sees)) & torch.ones(width, width, dtype=torch.bool, device=device).tril()
    return _Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device),
        mask,
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(np.concatenate(targets)).to(device),
    )


def _as_model_wants(
    model: PreTrainedModel, mask_BTT: torch.Tensor | None, precision: torch.dtype
) -> torch.Tensor | None:
    if mask_BTT is None:
        return None
    mask = mask_BTT[:, None]
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001  # transformers has no public name
        return mask
    dtype = precision if precision == torch.bfloat16 else next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _why_not_trees(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"{config.model_type} has layers of the kinds {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"{config.model_type} attends within a sliding window"
    if not getattr(model, "_supports_sdpa", False):
        return f"{config.model_type} takes no attention mask of its own"
    return None
