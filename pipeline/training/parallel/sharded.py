"""A policy whose weights, gradients and optimizer state lie in parts on all processes: torch's FSDP2 (`fully_shard`).

Each layer is a group that is gathered when it is read and let go after, and so are embeddings whose weights the head has not; last
norm and head are the outer group, whose weights the output layer reads while the forward pass runs. The layers' weights travel in
the dtype of `train.precision`, to which their products round them in any case, the others in the one they learn in; gradients are
summed in float32. Their sums are not divided by the number of processes, as each pair's loss already is by the step's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ConfigError
from pipeline.forward.compiled import decoder_layers
from pipeline.forward.logps import Forward
from pipeline.forward.output_layer import output_layer_of
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind
from pipeline.training.checkpoint import read_parts
from pipeline.training.parallel.unread import Unread
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
        (
            train.optimizer == "adafactor",
            "train.optimizer=adafactor: its state spans whole weights; set adamw or adamw_8bit",
        ),
        (train.optimizer_in_backward, "train.optimizer_in_backward: gradients are summed over devices first"),
        (train.activation_offloading, "train.activation_offloading: it would move gathered weights to and fro too"),
    ]
    if reasons := [reason for applies, reason in refused if applies]:
        raise ConfigError(
            f"training on {world.size} devices does not know {'; nor '.join(reasons)}. On one device it does (--devices 1)"
        )


def cut(root: torch.nn.Module, model: PreTrainedModel, mesh: DeviceMesh, precision: torch.dtype) -> None:
    """Cut the weights of `model`, which `root` runs, into parts for the processes of `mesh`.

    Each layer is a group, embeddings are one unless the head has their weights, and all others are the outermost.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    narrow = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # each layer is brought to the device as it is cut up
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=narrow)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        fully_shard(embeddings, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no sum that scales on its way
            module.set_force_sum_reduction_for_comms(enable=True)


def mesh_of(world: World) -> DeviceMesh:
    """All processes in a row; all must call it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_kind(), (world.size,))


class Shards:
    """The weights of `model` in parts: `whole` are all of them by name, as DTensors; `learning` are this process's parts of those
    that learn, for an optimizer that knows nothing of the others. `forward` is the pass that reads them.

    `unread`: what is not read yet; this process reads its parts. All processes must make one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Any,
        world: World,
        mesh: DeviceMesh,
        precision: torch.dtype,
        unread: Unread | None = None,
    ) -> None:
        self._world, self._mesh = world, mesh
        names = unread.forget(model) if unread else {}
        root = _Root(model, forward)
        self._root: Any = root
        cut(root, model, mesh, precision)
        # values per response are views of one tensor, and nothing is done to them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        if unread is not None:
            device = torch.device(mesh.device_type)
            # as `to_empty`, but of what is empty alone
            root._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)  # type: ignore[no-untyped-call]  # noqa: SLF001
        self.whole: dict[str, Any] = dict(model.named_parameters())
        if unread is not None:
            read_parts(
                unread.base,
                {there: self.whole[here] for here, there in names.items()},
                group=world.group,
                files=unread.files,
            )
        self.forward = _ShardedForward(root, forward)
        self.learning = {
            name: torch.nn.Parameter(local_of(weight)) for name, weight in self.whole.items() if weight.requires_grad
        }

    def check_head(self, model: PreTrainedModel, precision: torch.dtype) -> None:
        """Raise ConfigError if the head does something that is not reproduced; all processes must call it."""
        self.call(lambda: _check_head(model, self._mesh.device_type, precision))

    @property
    def root(self) -> torch.nn.Module:
        """What runs, with the hooks that gather its weights."""
        root: torch.nn.Module = self._root
        return root

    def module(self) -> torch.nn.Module:
        """The parts that learn, as a module without a forward pass."""
        return torch.nn.ParameterDict({name.replace(".", "/"): part for name, part in self.learning.items()})

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Hand every part its gradient, scaled if the norm of all is above `max_norm`; returns the norm before, a scalar."""
        squares = []
        for name, part in self.learning.items():
            gradient = self.whole[name].grad
            part.grad, self.whole[name].grad = None if gradient is None else local_of(gradient), None
            if part.grad is not None and part.grad.numel():
                squares.append(part.grad.float().square().sum().double())
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self.learning.values())).device)
        norm = self._world.total(torch.stack([zero, *squares]).sum()).sqrt().float()
        scale = torch.clamp((math.inf if max_norm is None else max_norm) / (norm + 1e-6), max=1.0)
        for part in self.learning.values():
            if part.grad is not None:
                part.grad.mul_(scale.to(part.grad.dtype))
        return norm

    def whole_weights(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight of `names`, whole, one after the other; all processes must take part to the end."""
        for name in names:
            yield name, self.whole[name].full_tensor()

    def call(self, forward: Any, *given: Any) -> Any:
        """What another pass gives of the same weights; all processes must call it."""
        try:
            return self._root("__call__", *given, through=forward)
        finally:
            # the outer group stays gathered until a backward pass: what is read into the parts meanwhile would not be seen
            self._root.reshard()


def _check_head(model: PreTrainedModel, kind: str, precision: torch.dtype) -> None:
    with torch.autocast(kind, torch.bfloat16, enabled=precision == torch.bfloat16):
        output_layer_of(model)


def local_of(tensor: Any) -> torch.Tensor:
    """This process's part of a DTensor, or a tensor that is in no parts, without its gradient; not copied."""
    from torch.distributed.tensor import DTensor

    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


class _Root(torch.nn.Module):
    """Everything that a forward pass reads, so that its hooks stand around all of it."""

    def __init__(self, model: PreTrainedModel, forward: Any) -> None:
        super().__init__()
        self.model = model
        # no submodule of its own
        self._forward = [forward]

    def forward(self, method: str, *given: Any, through: Any = None, **named: Any) -> Any:
        forward = through or self._forward[0]
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
