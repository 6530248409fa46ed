"""The optimizers of `train.optimizer`, and one update with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pipeline.config.experiment import TrainConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_optimizer(model: PreTrainedModel, train: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the weights that learn; norms and biases are not decayed.

    adamw: Loshchilov and Hutter 2017 (1711.05101). adamw_8bit: the same with block-wise 8-bit moments, Dettmers et al. 2021
    (2110.02861). adafactor: Shazeer and Stern 2018 (1804.04235), factored second moments, no first, steps clipped at a root mean
    square of 1 and not scaled by the weights' size. The first step of each changes a weight by about the learning rate (root
    mean square). ConfigError if the package of adamw_8bit is missing.
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


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_norm: float,
    means: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Clip, step with learning rate `rate`, forget the gradients.

    Returns `means` as numbers, and `grad_norm`, the norm before clipping: the one time that a step waits for the device. If one
    of them is not finite nothing is changed: the caller stops.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(learning, max_norm)
    values = numbers({**(means or {}), "grad_norm": norm})
    if all(map(math.isfinite, values.values())):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return values


def numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars of one device as Python's numbers, in one transfer."""
    stacked = torch.stack([tensor.detach().double() for tensor in tensors.values()])
    return dict(zip(tensors, stacked.tolist(), strict=True))
