"""Response logps of trees under a model: the one forward pass of trainer, gate, oracle engine and implicit judge.

A tree is a prompt (trunk) and the responses to it (branches). Laid out as one sequence [trunk | branch | branch | ...],
the trunk is read once: positions of every branch go on where the trunk ends, and no branch sees another. A tree with one
branch is an ordinary causal sequence, so the `separate` layout is the same code on single-branch trees.

Only response positions reach the output layer, in chunks, with logits in float32 inside a chunk and recomputed in the
backward pass: no [tokens, vocabulary] tensor stands in memory.

Shapes: B sequences of a batch, T their padded length, N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LOGITS_BYTES = 64 * 2**20


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
    to_logits = _logits_of(model)
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
        logps_N = _chunked_logps(hidden_NH, batch.targets_N, to_logits, int(model.config.get_text_config().vocab_size))
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


# --- output layer


def _logits_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """float32 logits [n, V] of hidden states [n, H], as the model's own head computes them."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2, 3
    factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite

    def to_logits(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)
            if factor != 1.0:
                logits = logits * factor
            return logits if cap is None else torch.tanh(logits / cap) * cap

    _must_equal_own_head(model, to_logits)
    return to_logits


@torch.no_grad()
def _must_equal_own_head(model: PreTrainedModel, to_logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = to_logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    scale = float(own.abs().max()) + 1.0
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 3e-2
    if float((own - ours).abs().max()) > tolerance * scale:
        raise ConfigError(
            f"the output layer of {type(model).__name__} does something refscore does not know, "
            "so its log-probabilities would be wrong: this architecture is not supported"
        )


def _chunked_logps(
    hidden_NH: torch.Tensor, targets_N: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor], vocabulary: int
) -> torch.Tensor:
    def logps_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = to_logits(hidden)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)

    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    chunks = zip(torch.split(hidden_NH, size), torch.split(targets_N, size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([logps_of(*chunk) for chunk in chunks])
    logps = [checkpoint(logps_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(logps)
