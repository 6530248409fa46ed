"""A model whose weights nobody has read yet, so that each process of a training reads its own parts of the files alone.

transformers builds it on the meta device. While adapters are put on it, each weight is a single number that says it has the shape
of the whole, as PEFT sends adapters to the meta device, numbers and all, if they meet it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from pipeline.errors import ConfigError
from pipeline.models.weights import loaded_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# for transformers: it builds the model, compares names and shapes with the files, and reads no number
NOWHERE = {"device_map": {"": "meta"}}


class NotInParts(ConfigError):
    """The files have weights that are joined or renamed when they are read."""


class Unread:
    """The weights of `model` that are on the meta device, from the directory `base`, and the names they have in its files.

    Raises NotInParts if they are not there as they are here.
    """

    def __init__(self, model: PreTrainedModel, base: Path) -> None:
        self.base, self.files = base, loaded_files(base)
        self._names: dict[int, str] = {}
        places = _places(model, self.files)
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_meta]
        with torch.no_grad():
            for module in model.modules():
                _make_buffers(model, module)
            for name, _ in buffers:
                if name in places:
                    # small, and the same in all processes
                    with safe_open(places[name], "pt") as file:
                        model.get_buffer(name).copy_(file.get_tensor(name))
        for name, weight in list(model.named_parameters()):
            if weight.is_meta:
                number = torch.empty((), dtype=weight.dtype).expand(weight.shape)
                # in place, so that weights that are tied stay so
                _swap(weight, torch.nn.Parameter(number, requires_grad=weight.requires_grad))
                self._names[id(weight)] = name

    def forget(self, model: PreTrainedModel) -> dict[str, str]:
        """Put the weights on the meta device, from which they are cut into parts; returns their names, now and in the files."""
        names = {}
        for name, weight in list(model.named_parameters()):
            if id(weight) in self._names:
                meta = torch.nn.Parameter(weight.data.to("meta"), requires_grad=weight.requires_grad)
                names[name] = self._names[id(weight)]
                _swap(weight, meta)
        return names


def _swap(weight: torch.Tensor, other: torch.Tensor) -> None:
    torch.utils.swap_tensors(weight, other)  # type: ignore[no-untyped-call]


def _places(model: PreTrainedModel, files: Sequence[Path]) -> dict[str, Path]:
    """For every weight and buffer the file that holds it; raises NotInParts unless it does so under the name and in the shape that
    it has in `model`.
    """
    shapes: dict[str, list[int]] = {}
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name], places[name] = list(file.get_slice(name).get_shape()), path
    kept = model.state_dict().keys()
    tensors = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]
    other = [name for name, tensor in tensors if tensor.is_meta and shapes.get(name) != list(tensor.shape)]
    if other:
        raise NotInParts(f"{files[0].parent} holds {other[0]} in another form")
    return {name: places[name] for name, _ in tensors if name in places}


def _make_buffers(model: PreTrainedModel, module: torch.nn.Module) -> None:
    """Compute what no file holds, as transformers does: it sets what is not on the meta device."""
    buffers = module._buffers  # noqa: SLF001  # no public way to set one
    missing = {name: buffer for name, buffer in buffers.items() if buffer is not None and buffer.is_meta}
    for name, buffer in missing.items():
        buffers[name] = torch.empty_like(buffer, device="cpu")
    if missing:
        model._init_weights(module)  # noqa: SLF001  # what from_pretrained calls
