"""From hidden states to the log-probabilities of given tokens, without a [tokens, vocabulary] tensor.

Logits exist in chunks of LOGITS_BYTES (GPU_LOGITS_BYTES), in float32. The backward pass computes each chunk's logits again and
turns them into gradients at once. Products: on a CPU forward in float32, backward in the arithmetic of the layers below, because a
gradient needs no more digits than they give it; on a GPU that computes in bfloat16, both from bfloat16 operands with float32
sums and results, so that no float32 copy of the weights is made and tensor cores do the work. Soft-capping (Gemma) and logit
scales (Cohere, Granite) included.

Shapes: N scored tokens, n tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeline.errors import ConfigError
from pipeline.forward import cpu_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = 32 * 2**20
# large enough for a GPU's multiplications; the backward pass holds two and a half times as much
GPU_LOGITS_BYTES = 512 * 2**20
# oneDNN keeps half a megabyte of compiled code for every number of rows it has seen, up to a thousand of them
_ROWS = 64
# rows of the weight's gradient that one product makes: less stands beside the gradient itself
_VOCABULARY_BLOCK = 8192


@dataclass(frozen=True)
class OutputLayer:
    """logits = cap * tanh(factor * (h W^T + b) / cap), or factor * (h W^T + b) without a cap.

    `computes_as`: the kind of device whose ways of multiplying are taken, in simulations; None: that of the tensors.
    """

    weight_VH: torch.nn.Parameter
    bias_V: torch.nn.Parameter | None
    factor: float
    cap: float | None
    computes_as: str | None = None

    @property
    def kind(self) -> str:
        """The kind of device that it computes as, "cpu" or "cuda"."""
        return self.computes_as or self.weight_VH.device.type

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """float32 logits [n, V]."""
        bias = None if self.bias_V is None else self.bias_V.float()
        return self.finish(torch.nn.functional.linear(hidden_nH.float(), self.weight_VH.float(), bias))

    def finish(self, product_nV: torch.Tensor) -> torch.Tensor:
        """What comes after the matrix product, in float32 if there is anything to do."""
        logits = product_nV.float() * self.factor if self.factor != 1.0 else product_nV
        return logits if self.cap is None else torch.tanh(logits.float() / self.cap) * self.cap

    def through_finish(self, change_nV: torch.Tensor, logits_nV: torch.Tensor) -> torch.Tensor:
        """The derivative by the matrix product, of what has the derivative `change_nV` by the logits."""
        if self.cap is not None:
            change_nV = change_nV * (1 - (logits_nV / self.cap) ** 2)
        return change_nV * self.factor if self.factor != 1.0 else change_nV

    def logps(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, coarse: torch.dtype, *, squares: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 log-probabilities [N] of `targets_N`; gradients are computed with `coarse` matrix products.

        With `squares` also log sum_v p(v)^2 [N], without gradient; else an empty tensor.
        """
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logps_and_squares: tuple[torch.Tensor, torch.Tensor] = _Logps.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
                hidden_NH, self.weight_VH, self.bias_V, targets_N, self, coarse, squares
            )
        return logps_and_squares

    @torch.no_grad()
    def top(self, hidden_NH: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 and float32 log-probabilities, both [N, count], of the likeliest tokens, the likeliest first."""
        most = LOGITS_BYTES if self.kind == "cpu" else GPU_LOGITS_BYTES
        size = max(1, most // (4 * len(self.weight_VH)))
        ids, logps = [], []
        for rows in _chunks(len(hidden_NH), size):
            found = self.logits(hidden_NH[rows]).log_softmax(1).topk(count, dim=1)
            ids.append(found.indices)
            logps.append(found.values)
        return torch.cat(ids), torch.cat(logps)


def output_layer_of(model: PreTrainedModel, *, checked: bool = True) -> OutputLayer:
    """The model's output layer. ConfigError, if that is `checked`, if its head does something that is not reproduced here."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    layer = OutputLayer(head.weight, head.bias, factor, getattr(config, "final_logit_softcapping", None))
    if checked:
        _must_equal_own_head(model, layer)
    return layer


class _Logps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        layer: OutputLayer,
        coarse: torch.dtype,
        squares: bool,  # noqa: FBT001  # autograd functions take no keywords
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.layer, ctx.coarse = layer, coarse
        multiply, size = _products(layer, weight_VH, bias_V, coarse, exact=True), _chunk_size(layer)
        hidden, targets = _filled_up(layer, hidden_NH, targets_N)
        logps, sums = (torch.empty(size, device=hidden.device) for size in (len(targets), len(targets) * squares))
        for rows in _chunks(len(targets), size):
            logps_nV = layer.finish(multiply(hidden[rows])).log_softmax(1)
            logps[rows] = logps_nV.gather(1, targets[rows, None])[:, 0]
            if squares:
                sums[rows] = logps_nV.mul_(2).logsumexp(1)
        logps, sums = logps[: len(targets_N)], sums[: len(targets_N)]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logps)
        ctx.mark_non_differentiable(sums)
        return logps, sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient_N, _ = gradients
        hidden_NH, weight_VH, bias_V, targets_N, logps_N = ctx.saved_tensors
        tokens, layer, coarse = len(targets_N), ctx.layer, ctx.coarse
        hidden_NH, targets_N, logps_N, gradient_N = _filled_up(layer, hidden_NH, targets_N, logps_N, gradient_N)
        multiply, size = _products(layer, weight_VH, bias_V, coarse, exact=False), _chunk_size(layer)
        hidden_gradient = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.empty_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows in _chunks(len(targets_N), size):
            hidden, gradient = hidden_NH[rows].to(multiply.dtype), gradient_N[rows, None]
            logits = layer.finish(multiply(hidden))
            # d logp / d logits = onehot(target) - softmax(logits); 1 - p of the target from its exact logp, as p may round to 1
            change = logits.softmax(1).neg_()
            change.scatter_(1, targets_N[rows, None], -logps_N[rows, None].expm1().to(change.dtype))
            change = layer.through_finish(change, logits).to(multiply.dtype)
            # scale by the incoming gradient on the [n, H] side: it is constant per row, and [n, H] is smaller than [n, V]
            if bias_gradient is not None:
                bias_gradient += (change * gradient).sum(0)
            if hidden_gradient is not None:
                hidden_gradient[rows] = multiply.pair(change, multiply.weight) * gradient
            if weight_gradient is not None:
                hidden = (hidden * gradient).to(multiply.dtype)
                for start in range(0, len(weight_VH), _VOCABULARY_BLOCK):
                    block = slice(start, start + _VOCABULARY_BLOCK)
                    product = multiply.pair(change[:, block].T, hidden)
                    if rows.start:
                        weight_gradient[block] += product
                    else:
                        weight_gradient[block] = product
        return (
            None if hidden_gradient is None else hidden_gradient[:tokens],
            None if weight_gradient is None else weight_gradient.to(weight_VH.dtype),
            None if bias_gradient is None else bias_gradient.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


class _Products(NamedTuple):
    """Products with the output layer's weights, of operands in `dtype`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    narrow: bool
    kind: str

    def __call__(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """The product h W^T + b [n, V]."""
        hidden_nH = hidden_nH.to(self.dtype)
        if not self.narrow:
            return cpu_products.linear(hidden_nH, self.weight, self.bias)
        product = in_float32(hidden_nH, self.weight.T, self.kind)
        return product if self.bias is None else product + self.bias

    def pair(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The product of two matrices."""
        return in_float32(left, right, self.kind) if self.narrow else cpu_products.linear(left, right.T)


def _products(
    layer: OutputLayer, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, coarse: torch.dtype, *, exact: bool
) -> _Products:
    """What multiplies in the forward pass (`exact`) and in the backward pass, which may be coarser."""
    narrow = multiplies_narrow(layer.kind) and torch.bfloat16 in (coarse, weight_VH.dtype)
    dtype = torch.bfloat16 if narrow else torch.float32 if exact else coarse
    bias = None if bias_V is None else bias_V.to(torch.float32 if narrow else dtype)
    return _Products(weight_VH.to(dtype), bias, dtype, narrow, layer.kind)


def multiplies_narrow(kind: str) -> bool:
    """Whether a kind of device multiplies bfloat16 matrices into float32 ones."""
    return kind == "cuda"


def in_float32(left: torch.Tensor, right: torch.Tensor, kind: str) -> torch.Tensor:
    """The product of two bfloat16 matrices, summed in float32 and not rounded again."""
    if kind == "cpu":  # has no such product; the same one in float32, where products of bfloat16 are exact
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _chunk_size(layer: OutputLayer) -> int:
    most = LOGITS_BYTES if layer.kind == "cpu" else GPU_LOGITS_BYTES
    return max(1, most // (4 * len(layer.weight_VH)))


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _filled_up(layer: OutputLayer, *sides: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of N rows, on a CPU with zeros behind them, so that the last chunk has one of few sizes."""
    if layer.kind != "cpu":
        return list(sides)
    size = _chunk_size(layer)
    last = len(sides[0]) % size
    more = min(-last % _ROWS, size - last)
    return [torch.nn.functional.pad(side, (0, 0) * (side.ndim - 1) + (0, more)) for side in sides]


@torch.no_grad()
def _must_equal_own_head(model: PreTrainedModel, layer: OutputLayer) -> None:
    training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=layer.weight_VH.device)[None]
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = layer.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    scale = float(own.abs().max()) + 1.0
    fine = layer.weight_VH.dtype == torch.float32 and not torch.is_autocast_enabled(layer.kind)
    tolerance = 1e-4 if fine else 3e-2
    if float((own - ours).abs().max()) > tolerance * scale:
        raise ConfigError(
            f"the output layer of {type(model).__name__} does something refscore does not know, "
            "so its log-probabilities would be wrong: this architecture is not supported"
        )
