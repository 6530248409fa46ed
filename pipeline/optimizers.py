"""The optimizers of `train.optimizer`, and one update with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_optimizer(model: PreTrainedModel, train: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the weights that learn; norms and biases are not decayed.

    adamw: Loshchilov and Hutter 2017 (1711.05101). adamw_8bit: the same with block-wise 8-bit moments, Dettmers et al. 2021
    (2110.02861). adafactor: Shazeer and Stern 2018 (1804.04235), factored second moments, no first. ConfigError where
    the package of adamw_8bit is missing.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, others = ([p for p in parameters if (p.ndim >= 2) == decays] for decays in (True, False))
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((decayed, train.weight_decay), (others, 0.0))
        if chosen
    ]
    if train.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=train.learning_rate)
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


def update(model: PreTrainedModel, optimizer: torch.optim.Optimizer, rate: float, max_norm: float) -> float:
    """Clip, step with learning rate `rate`, forget the gradients; returns the norm before clipping.

    Where the norm is not finite nothing is changed: the caller stops.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(learning, max_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return norm
