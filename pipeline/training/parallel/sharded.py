"""A policy whose weights, gradients and optimizer state lie in parts on all processes: torch's FSDP2 (`fully_shard`).

Each layer is a group that is gathered when it is read and let go after; embeddings, last norm and head are the outer group, whose
weights the output layer reads while the forward pass runs. Weights travel in the dtype that they learn in, so that the numbers are
those of one process; sums of gradients are not divided by the number of processes, as each pair's loss already is by the step's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from pipeline.errors import ConfigError, DataError
from pipeline.forward.compiled import decoder_layers
from pipeline.forward.logps import Forward
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind
from pipeline.training.checkpoint import INTEGER, Checkpoint
from pipeline.training.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from pipeline.config.experiment import Config


def must_be_shardable(config: Config, world: World) -> None:
    """Raise ConfigError for settings that this file cannot do on more than one device."""
    train, policy = config.train, config.policy
    refused = [
        (policy.load_in_4bit, "policy.load_in_4bit: its weights of four bits cannot be cut into shards"),
        (train.optimizer != "adamw", f"train.optimizer={train.optimizer}: its state spans whole weights; set adamw"),
        (train.optimizer_in_backward, "train.optimizer_in_backward: gradients are summed over devices first"),
        (train.activation_offloading, "train.activation_offloading: it would move gathered weights to and fro too"),
    ]
    if reasons := [reason for applies, reason in refused if applies]:
        raise ConfigError(
            f"training on {world.size} devices does not know {'; nor '.join(reasons)}. On one device it does (--devices 1)"
        )


def mesh_of(world: World) -> DeviceMesh:
    """All processes in a row; all must call it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_kind(), (world.size,))


class Shards:
    """The weights of `model` in parts. `forward` is the pass that reads them; `learning` are this process's parts of the weights
    that learn, by name, for an optimizer that knows nothing of the others.
    """

    def __init__(self, model: PreTrainedModel, forward: Any, world: World, mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self._world, self._names = world, [name for name, weight in model.named_parameters() if weight.requires_grad]
        # each layer is brought to the device as it is cut up
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        root = _Root(model, forward)
        fully_shard(root, mesh=mesh)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                # gloo has no sum that scales on its way
                module.set_force_sum_reduction_for_comms(enable=True)
        # values per response are views of one tensor, and nothing is done to them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.forward = _ShardedForward(root, forward)
        weights = dict(model.named_parameters())
        self._weights = {name: weights[name] for name in self._names}
        self.learning = {name: torch.nn.Parameter(_local(weight)) for name, weight in self._weights.items()}

    def module(self) -> torch.nn.Module:
        """The parts that learn, as a module without a forward pass."""
        return torch.nn.ParameterDict({name.replace(".", "/"): part for name, part in self.learning.items()})

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Hand every part its gradient, scaled if the norm of all is above `max_norm`; returns the norm before, a scalar."""
        squares = []
        for name, part in self.learning.items():
            gradient = self._weights[name].grad
            part.grad, self._weights[name].grad = None if gradient is None else _local(gradient), None
            if part.grad is not None and part.grad.numel():
                squares.append(part.grad.float().square().sum().double())
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self.learning.values())).device)
        norm = self._world.total(torch.stack([zero, *squares]).sum()).sqrt().float()
        scale = torch.clamp((math.inf if max_norm is None else max_norm) / (norm + 1e-6), max=1.0)
        for part in self.learning.values():
            if part.grad is not None:
                part.grad.mul_(scale.to(part.grad.dtype))
        return norm

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight that learns, whole, one after the other; all processes must take part to the end."""
        for name, weight in self._weights.items():
            yield name, weight.full_tensor()

    def state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights, and the optimizer's and the chance's state, whole, as a checkpoint of one process has them; empty but in the
        first process. All processes must call it.
        """
        from torch.distributed.tensor import DTensor

        weights: dict[str, torch.Tensor] = {}
        for name, whole in self.whole_weights():
            if self._world.first:
                weights[name] = whole.cpu()
        states = dict(self._chance())
        for name, part in self.learning.items():
            like: Any = self._weights[name]
            fields: dict[str, Any] = optimizer.state.get(part, {})
            for field, value in sorted(fields.items()):
                if isinstance(value, torch.Tensor) and value.shape == part.shape and part.ndim:
                    spread = DTensor.from_local(
                        value,
                        like.device_mesh,
                        like.placements,
                        run_check=False,
                        shape=like.shape,
                        stride=like.stride(),
                    )
                    gathered: Any = spread.full_tensor()
                else:
                    gathered = value
                if self._world.first and isinstance(gathered, torch.Tensor):
                    states[f"{name}/{field}"] = gathered.cpu().clone()
                elif self._world.first:
                    states[f"{name}/{field}{INTEGER}"] = torch.tensor(gathered)
        return (weights, states) if self._world.first else ({}, {})

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
        """Take this process's parts of a checkpoint, whatever number of processes wrote it. Only these parts are read.

        Raises DataError if it does not fit the model.
        """
        with safe_open(checkpoint.directory / "model.safetensors", "pt") as weights:
            if set(weights.keys()) != set(self._names):
                raise DataError(f"{checkpoint.directory} was saved from another model: start again with --restart")
            for name, part in self.learning.items():
                part.copy_(self._part(weights, name, name))
        with safe_open(checkpoint.directory / "optimizer.safetensors", "pt") as states:
            fields: dict[str, list[str]] = {}
            for key in states.keys():  # noqa: SIM118  # it is no dictionary
                name, _, field = key.rpartition("/")
                fields.setdefault(name, []).append(field)
            for name, part in self.learning.items():
                optimizer.state[part] = {
                    field.removesuffix(INTEGER): self._state(states, name, field) for field in fields.get(name, [])
                }
            ranks = len([key for key in states.keys() if key.startswith("random/cpu")])  # noqa: SIM118
            if ranks != self._world.size:
                # of as many processes as before chance goes on where it was; else it begins anew, another in each
                torch.manual_seed(torch.initial_seed() + 1_000_003 * checkpoint.step + self._world.rank)
                return
            torch.set_rng_state(states.get_tensor(f"random/cpu{_of(self._world.rank)}"))
            if (of_the_gpu := f"random/cuda{_of(self._world.rank)}") in states.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(states.get_tensor(of_the_gpu))

    def _chance(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The state of chance of every process, by name; all must take part."""
        device = next(iter(self.learning.values())).device
        kinds = {"cpu": torch.get_rng_state, **({"cuda": torch.cuda.get_rng_state} if device.type == "cuda" else {})}
        for kind, state in kinds.items():
            for rank, part in enumerate(self._world.gathered(state().to(device))):
                yield f"random/{kind}{_of(rank)}", part.cpu()

    def _state(self, states: Any, name: str, field: str) -> Any:
        key = f"{name}/{field}"
        if field.endswith(INTEGER):
            return int(states.get_tensor(key))
        whole = list(states.get_slice(key).get_shape())
        device = self.learning[name].device
        return (
            self._part(states, key, name) if whole == list(self._weights[name].shape) else states.get_tensor(key)
        ).to(device)

    def _part(self, file: Any, key: str, name: str) -> torch.Tensor:
        """This process's rows of a whole tensor in a file."""
        rows = self._weights[name].shape[0]
        size = -(-rows // self._world.size)
        start = min(rows, size * self._world.rank)
        part: torch.Tensor = file.get_slice(key)[start : min(rows, start + size)]
        return part


def _local(weight: Any) -> torch.Tensor:
    local: torch.Tensor = weight.to_local().detach()
    return local


def _of(rank: int) -> str:
    return f"/{rank}" if rank else ""


class _Root(torch.nn.Module):
    """Everything that a forward pass reads, so that its hooks stand around all of it."""

    def __init__(self, model: PreTrainedModel, forward: Any) -> None:
        super().__init__()
        self.model = model
        # no submodule of its own
        self._forward = [forward]

    def forward(self, method: str, *given: Any, **named: Any) -> Any:
        forward = self._forward[0]
        if isinstance(forward, Forward):
            # gathered now, and other tensors each time
            head: Any = self.model.get_output_embeddings()
            layer = replace(forward.layer, weight_VH=head.weight, bias_V=head.bias)
            forward = replace(forward, layer=layer)
        return getattr(forward, method)(*given, **named)


class _ShardedForward:
    """What a plain pass does, by weights in parts: all processes must call it as often."""

    def __init__(self, root: torch.nn.Module, plain: Any) -> None:
        self._root, self._plain = root, plain

    def __call__(self, trees: Sequence[Tree]) -> Any:
        """As the plain pass."""
        return self._root("__call__", trees)

    def aligned(self, trees: Sequence[Tree], *, squares: bool = True) -> Any:
        """As `Forward.aligned`."""
        return self._root("aligned", trees, squares=squares)

    def tokens(self, trees: Sequence[Tree]) -> int:
        """As the plain pass; nothing is read."""
        count: int = self._plain.tokens(trees)
        return count
