"""float32 products of layers on a CPU, by oneDNN.

torch multiplies float32 with MKL, which on AMD's processors reaches half of oneDNN's speed (`make bench-score` prints
both peaks); bfloat16 goes through oneDNN in any case. Results differ in rounding alone: both are float32 throughout.

Shapes: H and V, sizes of a layer's input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# builds of torch without oneDNN lack it
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FastProducts(TorchFunctionMode):
    """While it is entered, linear layers multiply with `linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch; hands on all but one."""
        return (linear if func is torch.nn.functional.linear else func)(*args, **(kwargs or {}))


def recomputation() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The two contexts of `torch.utils.checkpoint(context_fn=...)`: none for the forward pass, `FastProducts` for the
    recomputation, which runs after the original `with` block has ended.
    """
    return nullcontext(), FastProducts()


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002  # torch's name
    """What torch's function of this name gives, by oneDNN if all is float32 on a CPU: [..., H] to [..., V]."""
    operands = [input, weight] if bias is None else [input, weight, bias]
    ours = all(side.device.type == "cpu" and side.dtype == torch.float32 for side in operands)
    if not ours or torch.is_autocast_enabled("cpu") or not _ONEDNN:
        return torch.nn.functional.linear(input, weight, bias)
    product: torch.Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight_VH)
        return _product(hidden, weight_VH, bias_V)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight_VH = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight_VH.T) if ctx.needs_input_grad[0] else None,
            _product(rows.T, hidden.flatten(0, -2).T) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(hidden: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None = None) -> torch.Tensor:
    # what torch's compiler calls for such a layer; it has no public name
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight_VH, bias_V, "none", [], "")  # noqa: SLF001
    return product
