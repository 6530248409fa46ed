"""The optimizers of `train.optimizer`, and one update with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError

# what a step must not have, as its message calls it
MUST_BE_FINITE = {"loss": "loss", "grad_norm": "gradient norm"}
# weights that are rounded at once
_AT_ONCE = 2**24


def make_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the weights that learn; norms and biases are not decayed.

    adamw: Loshchilov and Hutter 2017 (1711.05101). adamw_8bit: the same with block-wise 8-bit moments, Dettmers et al. 2021
    (2110.02861). adafactor: Shazeer and Stern 2018 (1804.04235), factored second moments, no
    first, steps clipped at a root mean square of 1 and not scaled by the weights' size. The first step of each changes a weight
    by about the learning rate (root mean square). ConfigError if a package that is needed is missing.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, others = ([p for p in parameters if (p.ndim >= 2) == decays] for decays in (True, False))
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((decayed, train.weight_decay), (others, 0.0))
        if chosen
    ]
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # as transformers' Trainer sets it: the rate is the rate. Scaled by the weights' size, as torch's does, a step at 1e-6 is
        # 2e-8 on a layer, and 1e-9 on an adapter that begins at zero
        factored: torch.optim.Optimizer = Adafactor(
            groups, lr=train.learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
        )
        return factored
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ConfigError(
                "train.optimizer adamw_8bit needs the package bitsandbytes: .venv/bin/uv pip install bitsandbytes"
            ) from None
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=train.learning_rate)
        return optimizer
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)


def step_one(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter) -> None:
    """The optimizer's step for one weight of `group`; its state stays in the optimizer.

    Weights of 16 bits are stepped in float32 and rounded up or down by chance, in proportion to what is nearer: an update below
    half of their last digit would otherwise be lost every time.
    """
    narrow, groups = parameter.data if parameter.dtype == torch.bfloat16 else None, optimizer.param_groups
    if narrow is not None:
        gradient = parameter.grad
        parameter.grad, parameter.data = None, parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
        if narrow is not None:
            parameter.grad = None
            parameter.data = round_by_chance(parameter.data, narrow)


def round_by_chance(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Write float32 `values` to `rounded`, of bfloat16, so that the mean over chance is the value (stochastic rounding)."""
    # in parts: of embeddings, whole copies would take several GiB
    for part, whole in zip(
        *(torch.split(side.view(-1), _AT_ONCE) for side in (rounded, values.contiguous())), strict=True
    ):
        # the 16 bits that bfloat16 lacks, plus a number drawn among as many, carry over as often as they are large
        bits = whole.view(torch.int32) + torch.randint_like(whole, 0, 2**16, dtype=torch.int32)
        part.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
    return rounded


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_norm: float | None,
    means: Mapping[str, torch.Tensor] | None = None,
    clipping: Callable[[float | None], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Clip to `max_norm` (None: not at all), step with learning rate `rate`, forget the gradients. `clipping` does that in
    place of `clip` if gradients lie on several devices.

    Returns `means` as numbers, and `grad_norm`, the norm before clipping: the one time that a step waits for the device. If the
    loss or the norm is not finite nothing is changed: the caller stops.
    """
    norm = clipping(max_norm) if clipping else clip(model, max_norm)
    values = numbers({**(means or {}), "grad_norm": norm})
    if all(math.isfinite(value) for name, value in values.items() if name in MUST_BE_FINITE):
        for group in optimizer.param_groups:
            group["lr"] = rate
        step_all(optimizer)
    optimizer.zero_grad()
    return values


def clip(model: torch.nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale the gradients to a norm of `max_norm` if it is larger (None: never); returns what it was, a scalar."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.nn.utils.clip_grad_norm_(learning, math.inf if max_norm is None else max_norm)


def step_all(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step; one weight after another if some have 16 bits, so that few are wide at a time."""
    weights = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter.dtype != torch.bfloat16 for _, parameter in weights):
        optimizer.step()
        return
    for group, parameter in weights:
        step_one(optimizer, group, parameter)


def numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars of one device as Python's numbers, in one transfer."""
    stacked = torch.stack([tensor.detach().double() for tensor in tensors.values()])
    return dict(zip(tensors, stacked.tolist(), strict=True))
