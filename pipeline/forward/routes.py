"""How a model may read trees: packed in one sequence, one by one in a padded batch, or each alone.

Which of them gives what each sequence gives alone is tried on a small twin of the architecture (`pipeline.forward.twin`), forward
and backward, beyond its windows and limits, with sequences of very different length beside one another: in float32 on a CPU,
which is exact, then on the device and in the arithmetic that the model runs in, so with the kernels that training uses. What
cannot be tried is read alone.

Shapes: T tokens of a pack, B sequences, N scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.errors import ConfigError, first_line
from pipeline.forward import attention
from pipeline.forward.transfer import to_device
from pipeline.forward.trees import Tree, pack_trees, separated
from pipeline.forward.twin import NoTwin, stretched_from, twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# relative differences of hidden states and gradients that arithmetic in float32 makes in another order
_FLOAT32 = 1e-3
# in bfloat16 a way of reading may be so many times as far from float32 as the plain one is
_BFLOAT16 = 2.0
# trunks and branches beyond every window and limit of a twin, beside some far below
_LONG, _SHORT = ((11, (40, 5)), (2, (3,)), (9, (12, 3))), ((3, (6, 2)), (1, (4,)), (5, (5, 3)))


class Mode(NamedTuple):
    """Where and how the twin runs: a device, the dtype of its weights, and whether under autocast to bfloat16."""

    device: torch.device
    weights: torch.dtype
    autocast: bool


_EXACT = Mode(torch.device("cpu"), torch.float32, autocast=False)

# from trees to the hidden states [N, H] that predict their branches' tokens, in order
Read = Callable[["PreTrainedModel", Sequence[Tree]], torch.Tensor]


@dataclass(frozen=True)
class Route:
    """`kind` is packed, padded or alone; `why` what keeps the model from being packed (whole); `limit`: sequences of more
    tokens are read alone.
    """

    kind: str
    why: str | None = None
    limit: int | None = None

    def hidden(self, model: PreTrainedModel, trees: Sequence[Tree], *, tree: bool) -> torch.Tensor:
        """Hidden states [N, H] that predict the branches' tokens, in their order; `tree`: the trunk is read once."""
        if self.kind == "packed":
            trees = trees if tree else separated(trees)
            return self._within_limit(model, trees)
        return (read_padded if self.kind == "padded" else read_alone)(model, trees)

    def tokens(self, trees: Sequence[Tree], *, tree: bool) -> int:
        """Tokens that the model reads for `trees`, filling of batches included."""
        apart = separated(trees)
        if self.kind == "padded":
            return len(apart) * max((len(tree) for tree in apart), default=0)
        if self.kind == "alone":
            return sum(tree.longest for tree in apart)
        laid = trees if tree else apart
        packed = sum(len(tree) for tree in laid if self._fits(tree))
        return packed + sum(tree.longest for tree in separated([tree for tree in laid if not self._fits(tree)]))

    def _fits(self, tree: Tree) -> bool:
        return self.limit is None or tree.longest <= self.limit

    def _within_limit(self, model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
        if all(map(self._fits, trees)):
            return read_packed(model, trees)
        parts: dict[int, torch.Tensor] = {}
        short = [number for number, tree in enumerate(trees) if self._fits(tree)]
        if short:
            rows = [sum(map(len, trees[number].branches)) for number in short]
            states = read_packed(model, [trees[number] for number in short])
            parts |= dict(zip(short, torch.split(states, rows), strict=True))
        parts |= {number: read_alone(model, [tree]) for number, tree in enumerate(trees) if not self._fits(tree)}
        return torch.cat([parts[number] for number in range(len(trees))])


def route_of(model: PreTrainedModel, precision: torch.dtype, device: torch.device | None = None) -> Route:
    """How `model` may read trees, in `precision` (bfloat16: under autocast) on `device`, or where it lies. Sets its attention
    up for that.
    """
    route = _route_of(model, precision, device or next(model.parameters()).device)
    if route.kind == "packed":
        model.set_attn_implementation(attention.register())
    return route


def _route_of(model: PreTrainedModel, precision: torch.dtype, device: torch.device) -> Route:
    name = model.config.get_text_config().model_type
    try:
        twin = twin_of(model)
    except NoTwin as reason:
        return Route("alone", f"{name}: {reason}")
    modes = _modes(model, precision, device)
    try:
        _states_and_gradients(twin, read_alone, _trees(_SHORT), _EXACT)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  # sizes that do not fit one another show when they meet
        return Route("alone", f"{name}: no small twin of it runs ({first_line(error)})")
    if (why := _why_not(twin, modes, read_packed, _trees(_LONG))) is None:
        return Route("packed")
    limit = stretched_from(model)
    if limit is not None and _why_not(twin, modes, read_packed, _trees(_SHORT)) is None:
        return Route("packed", f"{name} turns positions by the longest one beside them beyond {limit} tokens", limit)
    if _why_not(twin, modes, read_padded, _trees(_LONG)) is None:
        return Route("padded", f"{name} {why}")
    return Route("alone", f"{name} {why}, nor padding")


# --- the three ways of reading


def layers_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that gives hidden states. Raises ConfigError if transformers does not tell it from the whole."""
    for part in (model.base_model, model.get_decoder()):
        if part is not None and part is not model:
            layers: PreTrainedModel = part
            return layers
    raise ConfigError(
        f"{type(model).__name__} is not supported: its layers cannot be run apart from its output layer. Choose another model"
    )


def read_packed(model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
    """One sequence under the mask of a pack."""
    if model.config.get_text_config()._attn_implementation != attention.NAME:  # noqa: SLF001  # transformers has no public name
        model.set_attn_implementation(attention.register())
    ids, pack, rows_N = pack_trees(trees, next(model.parameters()).device)
    output = layers_of(model)(
        input_ids=ids[None],
        attention_mask=attention.as_attention_mask(pack),
        position_ids=pack.positions_T[None],
        use_cache=False,
    )
    hidden_1TH: torch.Tensor = output.last_hidden_state
    return hidden_1TH[0, rows_N]


def read_padded(model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
    """Sequences of one branch each in one batch, padded at the end, where causal layers of any kind do not look."""
    device = next(model.parameters()).device
    trees = separated(trees)
    width = max(map(len, trees))
    ids = np.zeros((len(trees), width), dtype=np.int64)
    rows = []
    for number, tree in enumerate(trees):
        (branch,) = tree.branches
        ids[number, : len(tree)] = [*tree.trunk, *branch[:-1]]
        rows.append(number * width + np.arange(len(tree.trunk) - 1, len(tree)))
    hidden_BTH: torch.Tensor = layers_of(model)(input_ids=to_device(ids, device), use_cache=False).last_hidden_state
    return hidden_BTH.flatten(0, 1)[to_device(np.concatenate(rows), device)]


def read_alone(model: PreTrainedModel, trees: Sequence[Tree]) -> torch.Tensor:
    """Every sequence whole, to its last token, in a forward pass of its own."""
    device = next(model.parameters()).device
    states = []
    for tree in separated(trees):
        (branch,) = tree.branches
        ids = to_device(np.array([[*tree.trunk, *branch]], dtype=np.int64), device)
        hidden_1TH: torch.Tensor = layers_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        states.append(hidden_1TH[0, len(tree.trunk) - 1 : -1])
    return torch.cat(states)


# --- trying them on a twin


def _modes(model: PreTrainedModel, precision: torch.dtype, device: torch.device) -> list[Mode]:
    """In which modes the twin is compared: the exact one first, then the model's own if it is another."""
    weights = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else torch.float32
    used = Mode(device, weights, precision == torch.bfloat16)
    return [_EXACT] if used == _EXACT else [_EXACT, used]


def _trees(sizes: Sequence[tuple[int, tuple[int, ...]]]) -> list[Tree]:
    draw = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return [int(token) for token in draw.integers(5, 120, length)]

    return [Tree(ids(trunk), tuple(map(ids, branches))) for trunk, branches in sizes]


def _why_not(twin: PreTrainedModel, modes: list[Mode], read: Read, trees: list[Tree]) -> str | None:
    """Why `read` does not give what each sequence gives alone; None if it does, forward and backward, in every mode."""
    mechanism = "the mask of a tree" if read is read_packed else "padding at the end"
    twin.set_attn_implementation("eager")
    exact = _states_and_gradients(twin, read_alone, trees, _EXACT)
    try:
        for mode in modes:
            twin.to(device=mode.device, dtype=mode.weights)
            twin.set_attn_implementation("eager")
            plain = _states_and_gradients(twin, read_alone, trees, mode)
            ours = _states_and_gradients(twin, read, trees, mode)
            if not _agree(ours, plain, exact, exactly=mode == _EXACT):
                return f"does not follow {mechanism}"
            noise = 1e-5 if mode == _EXACT else _rows(plain[0], exact[0]).mean().item()
            if read is read_packed and not _independent(twin, trees, mode, noise):
                return f"does not follow {mechanism}: a branch depends on another"
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        # whatever a layer raises that was not made for this; the reason is logged, and the results are the same
        on = "" if mode.device.type == "cpu" else f" on {mode.device.type}"
        return f"takes no {mechanism.removeprefix('the ')}{on} ({first_line(error)})"
    finally:
        twin.to(device=_EXACT.device, dtype=_EXACT.weights)
    return None


def _agree(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor], *, exactly: bool) -> bool:
    """Hidden states by rows, then every gradient as a whole."""
    if exactly:
        floor = 1e-3 * torch.stack([gradient.norm() for gradient in plain[1:]]).norm()
        return _rows(ours[0], plain[0]).max().item() <= _FLOAT32 and all(
            ((mine - theirs).norm() <= _FLOAT32 * torch.maximum(theirs.norm(), floor)).item()
            for mine, theirs in zip(ours[1:], plain[1:], strict=True)
        )
    # experts are chosen by digits that bfloat16 lacks: single rows may go anywhere, all of them may not
    noise = [_rows(plain[0], exact[0]).mean(), _whole(plain[1:], exact[1:])]
    differences = [_rows(ours[0], exact[0]).mean(), _whole(ours[1:], exact[1:])]
    return all(
        (difference <= _BFLOAT16 * other + 0.01).item() for difference, other in zip(differences, noise, strict=True)
    )


def _rows(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    relative_N: torch.Tensor = (mine - theirs).norm(dim=1) / (theirs.norm(dim=1) + 1e-6)
    return relative_N


def _whole(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    flat = [torch.cat([tensor.flatten() for tensor in side]) for side in (mine, theirs)]
    relative: torch.Tensor = (flat[0] - flat[1]).norm() / (flat[1].norm() + 1e-6)
    return relative


def _states_and_gradients(twin: PreTrainedModel, read: Read, trees: list[Tree], mode: Mode) -> list[torch.Tensor]:
    """float32, on CPU: hidden states [N, H], then the gradient of a fixed function of them by every parameter that takes part."""
    twin.zero_grad()
    with torch.enable_grad():
        with _arithmetic(mode):
            hidden_NH = read(twin, trees)
        draw = torch.Generator().manual_seed(1)
        weights_NH = torch.randn(hidden_NH.shape, generator=draw).to(hidden_NH.device)
        torch.autograd.backward((hidden_NH.float() * weights_NH).sum())
    gradients = [
        torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.float().cpu()
        for parameter in layers_of(twin).parameters()
    ]
    return [hidden_NH.detach().float().cpu(), *gradients]


@torch.no_grad()
def _independent(twin: PreTrainedModel, trees: list[Tree], mode: Mode, noise: float) -> bool:
    """Whether no branch depends on another: other tokens in the first one change no other by more than the order of sums.

    Experts get the tokens of a whole pack at once, so that digits may change; nothing else does.
    """
    first, *others = trees
    changed = Tree(first.trunk, ([*reversed(first.branches[0])], *first.branches[1:]))
    with _arithmetic(mode):
        before, after = read_packed(twin, trees), read_packed(twin, [changed, *others])
    same = slice(len(first.branches[0]), None)
    return _rows(after[same].float(), before[same].float()).mean().item() <= noise


def _arithmetic(mode: Mode) -> AbstractContextManager[object]:
    return torch.autocast(mode.device.type, torch.bfloat16) if mode.autocast else nullcontext()
