"""Attention over packed trees, through transformers' attention interface, so that every model that uses it can be masked.

A pack is one sequence of trees laid side by side: [trunk | branch | branch | trunk | branch | ...]. A position sees the
trunk of its own tree and its own branch, up to itself; a sliding window counts positions, which restart where the trunk
ends. On CPU each tree has a dense mask of its own, in bfloat16 by `pipeline.forward.cpu_attention`, in float32 by torch's
scaled_dot_product_attention; on a GPU the pack is one call of FlexAttention with a block mask. Logit soft-caps (Gemma 2)
are computed in the open.

Shapes: H heads, T tokens of the pack, t tokens of a tree, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from pipeline.forward import cpu_attention

NAME = "refscore_tree"

# on CPU torch keeps five megabytes of kernels for every length that attention has seen, and frees none: lengths are few
_LENGTH = 32


@dataclass(frozen=True)
class Pack:
    """Where each token of a pack stands. Integer tensors [T]: `tree_T` its tree, `branch_T` its branch (0 = trunk, -1 =
    filling), `positions_T` its position in its own sequence; `trees` are the slices of the trees.
    """

    tree_T: torch.Tensor
    branch_T: torch.Tensor
    positions_T: torch.Tensor
    trees: Sequence[slice]
    branching: Sequence[bool]
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
        if not self.branching[number] and (window is None or window >= len(rows)):
            return None
        mask = self.may_see(window)(0, 0, rows[:, None], rows[None, :])
        mask = torch.nn.functional.pad(mask, (0, size - len(rows), 0, size - len(rows)))
        mask[len(rows) :, 0] = True  # a row that sees nothing would be NaN
        return mask

    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's block mask of the whole pack."""
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            length = len(self.tree_T)
            self._masks[window] = create_block_mask(
                self.may_see(window), None, None, length, length, device=str(self.tree_T.device)
            )
        return self._masks[window]


def carrier(pack: Pack) -> torch.Tensor:
    """What goes through a model as `attention_mask`: models hand a tensor of four dimensions on as it is."""
    # an attention that takes it for a mask gets NaN, never a wrong number
    tensor = torch.full((1, 1, 1, 1), float("nan"), device=pack.tree_T.device)
    tensor.refscore_pack = pack  # type: ignore[attr-defined]  # what it is made for
    return tensor


def register() -> str:
    """Make the attention known to transformers; returns the name to set on a model."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
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

    Raises NotImplementedError for terms that some architectures add (attention sinks, position biases, dropout).
    """
    if any(others.get(name) is not None for name in ("s_aux", "position_bias")) or others.get("dropout"):
        raise NotImplementedError(f"{type(module).__name__} adds terms to its attention")
    pack: Pack | None = getattr(attention_mask, "refscore_pack", None)
    if pack is None:
        if attention_mask is not None:
            raise NotImplementedError(f"{type(module).__name__} makes an attention mask of its own")
        pack = _one_sequence(query.shape[2], query.device)
    if query.device.type == "cpu" and softcap is None and _in_bfloat16(query):
        biases = [pack.bias(number, sliding_window, _rounded(rows)) for number, rows in enumerate(pack.trees)]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        operands = query.bfloat16(), key.bfloat16(), value.bfloat16()
        return cpu_attention.attend(operands, pack.trees, biases, scaling), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (side.repeat_interleave(groups, dim=1) for side in (key, value))
    if query.is_cuda:
        attended = _flex_attention()(
            query, key, value, score_mod=_capped(softcap), block_mask=pack.block_mask(sliding_window), scale=scaling
        )
    else:
        attended = torch.cat(
            [
                *(
                    _of_tree((query, key, value), pack, number, sliding_window, scaling, softcap)
                    for number in range(len(pack.trees))
                ),
                # what fills the pack up looks at nothing
                query.new_zeros((*query.shape[:2], query.shape[2] - pack.trees[-1].stop, value.shape[-1])),
            ],
            dim=2,
        )
    return attended.transpose(1, 2).contiguous(), None


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
) -> torch.Tensor:
    """Attention within tree `number` of a pack [1, H, t, D], computed at a rounded length."""
    rows = pack.trees[number]
    length, size = rows.stop - rows.start, _rounded(rows)
    query, key, value = (torch.nn.functional.pad(side[:, :, rows], (0, 0, 0, size - length)) for side in operands)
    return _sdpa(query, key, value, pack.dense_mask(number, window, size), scaling, softcap)[:, :, :length]


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
) -> torch.Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_tt, is_causal=mask_tt is None, scale=scaling
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh((query @ key.mT).float() * scaling / softcap) * softcap
    if mask_tt is None:
        mask_tt = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask_tt, float("-inf")).softmax(-1).to(value.dtype) @ value


def _one_sequence(length: int, device: torch.device) -> Pack:
    zeros = torch.zeros(length, dtype=torch.int64, device=device)
    return Pack(zeros, zeros, torch.arange(length, device=device), [slice(0, length)], [False])


def _capped(softcap: float | None) -> Callable[..., torch.Tensor] | None:
    if softcap is None:
        return None

    def score_mod(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return score_mod


@cache
def _flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # every width of a pack is compiled once; forward.py rounds widths, so that they are few
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001  # documented there
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled
