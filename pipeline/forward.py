"""Response logps of trees under a model: the one forward pass of trainer, gate, oracle engine and implicit judge.

A tree is a prompt (trunk) and the responses to it (branches). Trees are packed into one sequence: the trunk is read
once, positions of every branch go on where the trunk ends, and no branch sees another (`pipeline.tree_attention`).
Trees with the same trunk are merged, and equal branches read once. The `separate` layout is the same code on trees of one
branch. Models whose layers cannot be masked this way (state-space, linear attention, attention of their own) get separate
sequences padded at the end, with equal results.

Only response positions reach the output layer (`pipeline.output_layer`).

Shapes: T tokens of a pack, N scored tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline import tree_attention
from pipeline.output_layer import OutputLayer, output_layer_of
from pipeline.products import FastProducts
from pipeline.tree_attention import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Widths of packs are multiples of this, so that they are few: on a GPU every width is compiled once, on CPU blocks of memory
# fit again that an earlier pack has freed.
_WIDTH = {"cuda": 1024, "cpu": 128}


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt and of the responses to it."""

    trunk: Sequence[int]
    branches: tuple[Sequence[int], ...]

    def __len__(self) -> int:
        """Tokens of the laid-out sequence; the last token of a branch predicts nothing and is left out."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)


# what packs are tried on: branches of other lengths, so that a position taken from the pack is far off
_PROBE = (Tree([1, 2, 3], ([4, 5, 6, 7] * 6, [7, 8])), Tree([2], ([3, 1, 4],)))
# trees without equal trunks or branches to the hidden states [N, H] that predict the branches' tokens, in their order
Hidden = Callable[[Sequence[Tree]], torch.Tensor]
# for each tree and branch a float32 tensor with one value per response token
PerToken = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Forward:
    """A function from trees to logps: for each tree and branch a float32 tensor with one value per response token."""

    hidden_of: Hidden
    layer: OutputLayer
    precision: torch.dtype

    def __call__(self, trees: Sequence[Tree]) -> PerToken:
        """Logps of every branch of every tree."""
        return self.aligned(trees, squares=False)[0]

    def aligned(self, trees: Sequence[Tree], *, squares: bool = True) -> tuple[PerToken, PerToken]:
        """Logps, and beside each the logarithm of the sum of all tokens' squared probabilities there (no gradient)."""
        merged, places = merge(trees)
        branches = [branch for tree in merged for branch in tree.branches]
        targets_N = torch.from_numpy(np.concatenate([np.asarray(branch, dtype=np.int64) for branch in branches]))
        hidden_NH = self.hidden_of(merged)
        logps_N, squares_N = self.layer.logps(
            hidden_NH, targets_N.to(hidden_NH.device), self.precision, squares=squares
        )
        lengths = [len(branch) for branch in branches]
        flat = [torch.split(values, lengths) if len(values) else [] for values in (logps_N, squares_N)]
        logps, sums = ([[each[place] for place in tree] for tree in places] if each else [] for each in flat)
        return logps, sums


def forward_of(model: PreTrainedModel, layout: str, precision: torch.dtype = torch.float32) -> Forward:
    """The forward pass of a causal language model; `precision` bfloat16 runs the layers (not the logits) under autocast.

    Raises ConfigError where the model's output layer does something that is not reproduced here.
    """
    return Forward(hidden_states_of(model, layout, precision), output_layer_of(model), precision)


def hidden_states_of(model: PreTrainedModel, layout: str, precision: torch.dtype) -> Hidden:
    """A function from merged trees to the hidden states that predict the branches' tokens; says in the log which way."""
    device = next(model.parameters()).device

    def arithmetic() -> AbstractContextManager[object]:
        if precision == torch.bfloat16:
            return torch.autocast(device.type, torch.bfloat16)
        return FastProducts() if device.type == "cpu" else nullcontext()

    if reason := _why_not_packed(model):
        log.warning("layout: separate padded sequences, as %s", reason)

    def hidden_of(trees: Sequence[Tree]) -> torch.Tensor:
        with arithmetic():
            if reason:
                return _padded(model, _separated(trees))
            return _packed(model, trees if layout == "tree" else _separated(trees))

    return hidden_of


def merge(trees: Sequence[Tree]) -> tuple[list[Tree], list[list[int]]]:
    """Trees with every trunk once and every branch of it once; for each given tree and branch its number among the
    merged trees' branches, counted through.
    """
    branches: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for tree in trees:
        known = branches.setdefault(tuple(tree.trunk), {})
        for branch in tree.branches:
            known.setdefault(tuple(branch), len(known))
    starts, count = {}, 0
    for trunk, known in branches.items():
        starts[trunk] = count
        count += len(known)
    places = []
    for tree in trees:
        trunk = tuple(tree.trunk)
        places.append([starts[trunk] + branches[trunk][tuple(branch)] for branch in tree.branches])
    return [Tree(trunk, tuple(known)) for trunk, known in branches.items()], places


# --- packed, for models that attend through transformers' interface


def _packed(model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
    if model.config.get_text_config()._attn_implementation != tree_attention.NAME:  # noqa: SLF001  # somebody else changed it
        model.set_attn_implementation(tree_attention.NAME)
    output, rows_N = _run_packed(model, trees)
    hidden_1TH: torch.Tensor = output.last_hidden_state
    return hidden_1TH[0, rows_N]


def _run_packed(model: PreTrainedModel, trees: Sequence[Tree], **asked: bool) -> tuple[Any, torch.Tensor]:
    """The model's output for the pack, and the positions [N] of `pack_trees`."""
    ids, pack, rows_N = pack_trees(trees, next(model.parameters()).device)
    output = model.base_model(
        input_ids=ids[None],
        attention_mask=tree_attention.carrier(pack),
        position_ids=pack.positions_T[None],
        use_cache=False,
        **asked,
    )
    return output, rows_N


def pack_trees(trees: Sequence[Tree], device: torch.device) -> tuple[torch.Tensor, Pack, torch.Tensor]:
    """Token ids [T], the pack, and the positions [N] whose hidden states predict the branches' tokens."""
    total, multiple = sum(map(len, trees)), _WIDTH.get(device.type, 1)
    width = -(-total // multiple) * multiple
    ids, positions, number_of = (np.zeros(width, dtype=np.int64) for _ in range(3))
    branch_of = np.full(width, -1, dtype=np.int64)
    rows, slices, start = [], [], 0
    for number, tree in enumerate(trees):
        first, end = start, start + len(tree.trunk)
        ids[first:end], branch_of[first:end], positions[first:end] = tree.trunk, 0, np.arange(end - first)
        start = end
        for which, branch in enumerate(tree.branches, start=1):
            inner = len(branch) - 1
            ids[start : start + inner], branch_of[start : start + inner] = branch[:-1], which
            positions[start : start + inner] = np.arange(end - first, end - first + inner)
            # the trunk's last position predicts the first token of every branch
            rows.append(np.concatenate([[end - 1], np.arange(start, start + inner)]))
            start += inner
        number_of[first:start] = number
        slices.append(slice(first, start))
    # padding at the end sees padding only, and is in no tree's slice
    number_of[total:] = len(trees)
    tree_T, branch_T, positions_T = (
        torch.from_numpy(values).to(device) for values in (number_of, branch_of, positions)
    )
    pack = Pack(tree_T, branch_T, positions_T, slices, [len(tree.branches) > 1 for tree in trees])
    return torch.from_numpy(ids).to(device), pack, torch.from_numpy(np.concatenate(rows)).to(device)


def _separated(trees: Sequence[Tree]) -> list[Tree]:
    return [Tree(tree.trunk, (branch,)) for tree in trees for branch in tree.branches]


def _why_not_packed(model: PreTrainedModel) -> str | None:
    """Set the model up for packs, or say why that cannot be: tried on small trees against plain sequences."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{config.model_type} has layers of the kinds {', '.join(sorted(kinds))}"
    before = config._attn_implementation  # noqa: SLF001  # transformers has no public name
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if _follows(model):
                return None
        reason = f"{config.model_type} does not follow the mask of a tree"
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        # whatever a layer raises that was not made for this mask; the reason is logged, and the results are the same
        reason = f"{config.model_type} takes no mask of a tree ({str(error).splitlines()[0]})"
    finally:
        model.train(training)
    model.set_attn_implementation(before)
    return reason


def _follows(model: PreTrainedModel) -> bool:
    """Whether packs give the hidden states of plain sequences, after every layer.

    In bfloat16 the last layers may turn rounding into anything (SmolLM2: 60 % between two of transformers' own attentions):
    there the layers up to the first of each kind are compared, and no branch may depend on another by a single bit.
    """
    # the architecture's own arithmetic; others leave soft-caps out
    model.set_attn_implementation("eager")
    plain = _states(*_run_padded(model, _separated(_PROBE), output_hidden_states=True))
    model.set_attn_implementation(tree_attention.register())
    packed = _states(*_run_packed(model, _PROBE, output_hidden_states=True))
    differences = [
        float(((mine - theirs).norm(dim=1) / (theirs.norm(dim=1) + 1e-6)).max())
        for mine, theirs in zip(packed, plain, strict=True)
    ]
    if next(model.parameters()).dtype == torch.float32:
        return max(differences) <= 1e-3
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    early = 1 + max(kinds.index(kind) for kind in set(kinds))
    first, *others = _PROBE
    changed = Tree(first.trunk, ([9, 8] * 12, *first.branches[1:]))
    again = _states(*_run_packed(model, [changed, *others], output_hidden_states=True))
    same = slice(len(changed.branches[0]), None)
    return max(differences[: early + 1]) <= 0.05 and torch.equal(again[-1][same], packed[-1][same])


def _states(output: Any, rows_N: torch.Tensor) -> list[torch.Tensor]:
    """float32 hidden states [N, H] after the embedding and after every layer."""
    return [state.flatten(0, 1)[rows_N].float() for state in output.hidden_states]


# --- padded, for every model


def _padded(model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
    """Sequences of one branch each, padded at the end, where causal layers of any kind do not look."""
    output, rows_N = _run_padded(model, trees)
    hidden_BTH: torch.Tensor = output.last_hidden_state
    return hidden_BTH.flatten(0, 1)[rows_N]


def _run_padded(model: PreTrainedModel, trees: Sequence[Tree], **asked: bool) -> tuple[Any, torch.Tensor]:
    """The model's output for a batch of sequences, and the positions [N] in it that predict the branches' tokens."""
    device = next(model.parameters()).device
    width = max(map(len, trees))
    ids = np.zeros((len(trees), width), dtype=np.int64)
    rows = []
    for number, tree in enumerate(trees):
        (branch,) = tree.branches
        ids[number, : len(tree)] = [*tree.trunk, *branch[:-1]]
        rows.append(number * width + np.arange(len(tree.trunk) - 1, len(tree)))
    output = model.base_model(input_ids=torch.from_numpy(ids).to(device), use_cache=False, **asked)
    return output, torch.from_numpy(np.concatenate(rows)).to(device)
