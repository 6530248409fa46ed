"""A model's weights as safetensors files of a bounded size, written one after the other, so that one file is in memory at a time.

Names, the split into files and the index are those of transformers' `save_pretrained`, by huggingface_hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model's files hold, by name: weights that are tied once, and buffers that are saved."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def are_converted(model: PreTrainedModel) -> bool:
    """Whether transformers joined or renamed weights when it read the files, and would do the reverse to save them."""
    return bool(getattr(model, "_weight_conversions", None))


def write_weights(
    directory: Path,
    like: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    at_most: str,
    *,
    writes: bool = True,
) -> None:
    """Write `weights`, which come in any order and are as `like`, in `dtype` to files of `at_most` ("5GB") each. Integers stay so.

    Without `writes` they are only asked for, as all processes that share them must.
    """
    kept_in = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in like.items()}
    described = {name: torch.empty(tensor.shape, dtype=kept_in[name], device="meta") for name, tensor in like.items()}
    split = split_torch_state_dict_into_shards(
        described, filename_pattern="model{suffix}.safetensors", max_shard_size=at_most
    )
    waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, weight in weights:
        if not writes:
            continue
        file = split.tensor_to_filename[name]
        waiting[file][name] = weight.detach().to(device="cpu", dtype=kept_in[name]).contiguous()
        if len(waiting[file]) == len(split.filename_to_tensors[file]):
            save_file(waiting.pop(file), directory / file, metadata={"format": "pt"})
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_configuration(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write what stands beside the weights: what the model is, how it generates, and its own code if it has any.

    To be called before the weights are written: transformers removes files that look like those of another model.
    """
    trained = model.config.dtype
    try:
        model.save_pretrained(directory, state_dict={})
    finally:
        model.config.dtype = trained
    path = directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # transformers says the dtype that it has in memory
    content["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
