"""Layers that torch compiles, each by itself; attention over packs is compiled apart from them (`pipeline.forward.attention`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.forward.routes import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's layers, one after another; none if they are not found."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = (part for part in layers_of(model).modules() if isinstance(part, torch.nn.ModuleList))
    return list(next((part for part in lists if len(part) == number), torch.nn.ModuleList()))


def compile_layers(model: PreTrainedModel) -> int:
    """Compile every layer of the model by itself, as one after another is what a checkpointed pass runs; returns how many."""
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile()
    return len(layers)
