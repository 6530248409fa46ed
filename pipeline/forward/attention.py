"""Attention over packed trees, through transformers' attention interface, so that every model that uses it can be masked.

A pack is one sequence of trees laid side by side: [trunk | branch | branch | trunk | branch | ...]. A position sees the
trunk of its own tree and its own branch, up to itself; a sliding window counts positions, which restart where the trunk
ends. On CPU each tree has a dense mask of its own, in bfloat16 by `pipeline.forward.cpu_attention`, in float32 by torch's
scaled_dot_product_attention; with soft-caps (Gemma 2) or sinks (gpt-oss) it is written out. On a GPU the pack is one call of
transformers' own FlexAttention with a block mask (`pipeline.forward.block_mask`), which knows both, and grouped heads.

Shapes: H heads, T tokens of the pack, t tokens of a tree, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from pipeline.forward import cpu_attention
from pipeline.forward.block_mask import block_mask_of, rectangles

NAME = "refscore_tree"

# on CPU torch keeps five megabytes of kernels for every length that attention has seen, and frees none: lengths are few
_LENGTH = 32


@dataclass(frozen=True)
class Pack:
    """Where each token of a pack stands. Integer tensors [T]: `tree_T` its tree, `branch_T` its branch (0 = trunk, -1 =
    filling), `positions_T` its position in its own sequence; `trees` are the slices of the trees, `branches` those of each
    tree's branches.
    """

    tree_T: torch.Tensor
    branch_T: torch.Tensor
    positions_T: torch.Tensor
    trees: Sequence[slice]
    branches: Sequence[Sequence[slice]]
    _masks: dict[Any, Any] = field(default_factory=dict)

    def may_see(self, window: int | None) -> Callable[..., torch.Tensor]:
        """Whether query position q sees key position k, as FlexAttention's mask_mod asks it: (batch, head, q, k)."""
        tree_T, branch_T, positions_T = self.tree_T, self.branch_T, self.positions_T

        def seen(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:  # noqa: ARG001  # their signature
            same = (tree_T[q] == tree_T[k]) & ((branch_T[k] == 0) | (branch_T[q] == branch_T[k]))
            near = same & (k <= q)
            return near if window is None else near & (positions_T[q] - positions_T[k] < window)

        return seen

    def dense_mask(self, number: int, window: int | None, size: int) -> torch.Tensor | None:
        """Boolean mask [size, size] of tree `number`, filled up behind it; None if it is plainly causal."""
        key = (number, window)
        if key not in self._masks:
            self._masks[key] = self._seen(number, window, size)
        mask: torch.Tensor | None = self._masks[key]
        return mask

    def bias(self, number: int, window: int | None, size: int) -> torch.Tensor:
        """float32 [size, size] to be added to the scores of tree `number`: -inf where a position is not seen."""
        key = ("bias", number, window)
        if key not in self._masks:
            seen = self._seen(number, window, size)
            seen = torch.ones(size, size, dtype=torch.bool).tril() if seen is None else seen
            self._masks[key] = torch.zeros(size, size).masked_fill_(~seen, float("-inf"))
        mask: torch.Tensor = self._masks[key]
        return mask

    def _seen(self, number: int, window: int | None, size: int) -> torch.Tensor | None:
        rows = torch.arange(self.trees[number].start, self.trees[number].stop, device=self.tree_T.device)
        if len(self.branches[number]) < 2 and (window is None or window >= len(rows)):
            return None
        mask = self.may_see(window)(0, 0, rows[:, None], rows[None, :])
        mask = torch.nn.functional.pad(mask, (0, size - len(rows), 0, size - len(rows)))
        mask[len(rows) :, 0] = True  # a row that sees nothing would be NaN
        return mask

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's block mask of the whole pack."""
        if window not in self._masks:
            total = len(self.tree_T)
            parts = rectangles(self.trees, self.branches, total)
            self._masks[window] = block_mask_of(parts, total, window, self.may_see(window), self.tree_T.device)
        return self._masks[window]


def uses_flex(device: torch.device) -> bool:
    """Whether attention over packs is FlexAttention on this device."""
    return device.type == "cuda"


def as_attention_mask(pack: Pack) -> torch.Tensor:
    """What goes through a model as `attention_mask`: models hand a tensor of four dimensions on as it is."""
    # an attention that takes it for a mask gets NaN, never a wrong number
    tensor = torch.full((1, 1, 1, 1), float("nan"), device=pack.tree_T.device)
    tensor.refscore_pack = pack  # type: ignore[attr-defined]  # what it is made for
    return tensor


def register() -> str:
    """Make the attention known to transformers; returns the name to set on a model."""
    from transformers import AttentionInterface

    # compiled layers call it as it is, and nothing that it calls is traced: a pack differs from every other in its slices, each of
    # which would be compiled anew. FlexAttention is compiled by itself, inside too
    outside: Any = torch.compiler.disable
    AttentionInterface.register(NAME, outside(attend))
    return NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output [1, T, H, D] of `query`, `key`, `value` [1, H, T, D] (fewer key heads if they are shared).

    Raises NotImplementedError for terms that some architectures add: position biases and dropout.
    """
    flex = uses_flex(query.device)
    sinks: torch.Tensor | None = others.get("s_aux")
    if others.get("position_bias") is not None or others.get("dropout"):
        raise NotImplementedError(f"{type(module).__name__} adds terms to its attention")
    pack: Pack | None = getattr(attention_mask, "refscore_pack", None)
    if pack is None:
        if attention_mask is not None:
            raise NotImplementedError(f"{type(module).__name__} makes an attention mask of its own")
        pack = _one_sequence(query.shape[2], query.device)
    if flex:
        return _by_flex(module, (query, key, value), pack.block_mask(sliding_window), scaling, softcap, sinks), None
    if query.device.type == "cpu" and softcap is None and sinks is None and _in_bfloat16(query):
        biases = [pack.bias(number, sliding_window, _rounded(rows)) for number, rows in enumerate(pack.trees)]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        operands = query.bfloat16(), key.bfloat16(), value.bfloat16()
        return cpu_attention.attend(operands, pack.trees, biases, scaling), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    attended = torch.cat(
        [
            *(
                _of_tree((query, key, value), pack, number, sliding_window, scaling, softcap, sinks)
                for number in range(len(pack.trees))
            ),
            # what fills the pack up looks at nothing
            query.new_zeros((*query.shape[:2], query.shape[2] - pack.trees[-1].stop, value.shape[-1])),
        ],
        dim=2,
    )
    return attended.transpose(1, 2).contiguous(), None


def _by_flex(
    module: torch.nn.Module,
    operands: tuple[torch.Tensor, ...],
    mask: Any,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention [1, T, H, D] by transformers' FlexAttention, compiled, in the arithmetic that training uses.

    A kernel that cannot be compiled is an error: without it the [T, T] scores would be written to memory.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    _allow_few_kernels()
    device = operands[0].device.type
    if torch.is_autocast_enabled(device):
        # rotary embeddings widen queries and keys; no kernel takes them beside narrow values
        operands = tuple(side.to(torch.get_autocast_dtype(device)) for side in operands)
    attended: torch.Tensor = flex_attention_forward(
        module, *operands, mask, scaling=scaling, softcap=softcap, s_aux=sinks
    )[0]
    return attended


@cache
def _allow_few_kernels() -> None:
    config = torch._dynamo.config  # noqa: SLF001  # documented there
    # widths of packs are few (`pipeline.forward.trees`), and each may be compiled; beyond them the unfused one would be run
    config.recompile_limit = max(config.recompile_limit, 64)
    config.fail_on_recompile_limit_hit = True


def _in_bfloat16(query: torch.Tensor) -> bool:
    # rotary embeddings widen queries and keys, which autocast would narrow again
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return autocast or query.dtype == torch.bfloat16


def _of_tree(
    operands: tuple[torch.Tensor, ...],
    pack: Pack,
    number: int,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention within tree `number` of a pack [1, H, t, D], computed at a rounded length."""
    rows = pack.trees[number]
    length, size = rows.stop - rows.start, _rounded(rows)
    query, key, value = (torch.nn.functional.pad(side[:, :, rows], (0, 0, 0, size - length)) for side in operands)
    return _sdpa(query, key, value, pack.dense_mask(number, window, size), scaling, softcap, sinks)[:, :, :length]


def _rounded(rows: slice) -> int:
    length: int = rows.stop - rows.start
    return -(-length // _LENGTH) * _LENGTH


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask_tt: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by torch's own function, or written out for what it lacks: a soft-cap on scores, and sinks.

    A sink is a score per head that takes part in the softmax and has no value, as in gpt-oss.
    """
    if softcap is None and sinks_H is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_tt, is_causal=mask_tt is None, scale=scaling
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.mT).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask_tt is None:
        mask_tt = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask_tt, float("-inf"))
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value


def _one_sequence(length: int, device: torch.device) -> Pack:
    zeros = torch.zeros(length, dtype=torch.int64, device=device)
    return Pack(zeros, zeros, torch.arange(length, device=device), [slice(0, length)], [[]])
