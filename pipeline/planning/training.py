"""How much memory a training step holds at its peak, found by running it on tensors that have shapes and no numbers.

The step is the trainer's own: model, checkpointing, output layer, optimizer, the step inside the backward pass. torch's
FakeTensorMode runs it without memory and its MemTracker adds up what is alive. Over several devices the model is cut into parts as
the trainer cuts it (FSDP2), for processes that only seem to be there, and torch's FSDPMemTracker adds up what lies on the first of
them, which holds the most. What is left out: the fragmentation of an allocator, CUDA's own context and kernels (about half a GiB),
buffers of NCCL, and what a step does not hold (evaluation, the export's check).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.experiment import Config
from pipeline.errors import ConfigError, first_line
from pipeline.planning.numberless import loss_of, model_of, optimizer_of
from pipeline.training.lean import StepInBackward
from pipeline.training.optimizers import clip, step_all
from pipeline.training.parallel.sharded import Shards, must_be_shardable
from pipeline.training.parallel.world import World
from pipeline.training.policies import precision_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# what torch's two trackers tell apart
_NAMES = {
    "weights": ("Parameter", "Buffer", "Sharded Param"),
    "gradients": ("Gradient", "Sharded Grad"),
    "optimizer": ("Optstate", "OptState"),
    "activations": ("Activation", "Inputs"),
    "gathered": ("Unsharded Param", "All Gather", "Unsharded Grad", "Reduce Scatter"),
    "temporary": ("Temp", "Other"),
}


@dataclass(frozen=True)
class Held:
    """Bytes at the peak of a step on one device, by what they are.

    `gathered`: over several devices, whole weights of what is being read, and gradients on their way to all devices.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    temporary: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@contextmanager
def held_by(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[list[Held]]:
    """Track the memory of tensors while it is entered; afterwards the list has one entry, the peak.

    A `model` that is cut into parts may run once.
    """
    tracker, peak = _tracker(model, optimizer), list[Held]()
    with tracker, warnings.catch_warnings():
        # the step inside the backward pass has dropped the gradient before the tracker looks at it
        warnings.filterwarnings("ignore", message="Expected a tensor or a traceable wrapper-subclass")
        yield peak
    snapshots = tracker.get_tracker_snapshot("peak").values()
    found = {str(getattr(name, "value", name)): size for snapshot in snapshots for name, size in snapshot.items()}
    peak.append(Held(**{kind: sum(found.get(name, 0) for name in names) for kind, names in _NAMES.items()}))


def simulate_step(
    config: Config,
    base: Path,
    tokens: int,
    scored: int,
    kind: str,
    devices: int = 1,
    *,
    accumulated: bool = False,
) -> Held:
    """What a step holds whose forward pass reads `tokens` tokens, of which `scored` predict response tokens.

    `kind`: the device that the step computes as, "cpu" or "cuda"; `devices`: as many train together, each a pass of its own.
    `accumulated`: gradients of an earlier pass are there. Raises ConfigError for what is not simulated: bases of 4 bits, reward
    and value models, and on several devices what they do not train.
    """
    if config.policy.load_in_4bit or config.train.of_scores:
        raise ConfigError(
            "memory is predicted for policies with bases of 16 or 32 bits alone, not for models of scores"
        )
    if devices > 1:
        must_be_shardable(config, World(0, devices))
    from torch._subclasses.fake_tensor import FakeTensorMode

    # it logs tracebacks of what is said in one line below
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        if devices > 1:
            with seeming(devices) as mesh, FakeTensorMode():
                return _over_devices(config, base, tokens, scored, kind, mesh, accumulated=accumulated)
        with FakeTensorMode():
            return _alone(config, base, tokens, scored, kind, accumulated=accumulated)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
        # layers that look at numbers (experts), or have no attention that can be replaced
        raise ConfigError(
            f"memory is not predicted for {config.policy.model!r}: its layers do not run without numbers ({first_line(error)})"
        ) from None


def _alone(config: Config, base: Path, tokens: int, scored: int, kind: str, *, accumulated: bool) -> Held:
    model, layer = model_of(config, base, kind)
    optimizer = with_states(optimizer_of(model, config), model)
    inside = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
    if accumulated and inside is None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with held_by(model, optimizer) as peak:
        torch.autograd.backward(loss_of(config, model, layer, tokens, scored, kind))
        if inside is None:
            clip(model, config.train.max_grad_norm)
            step_all(optimizer)
            optimizer.zero_grad()
        else:
            inside.grad_norm()
    return peak[0]


def _over_devices(
    config: Config, base: Path, tokens: int, scored: int, kind: str, mesh: DeviceMesh, *, accumulated: bool
) -> Held:
    model, layer = model_of(config, base, kind)

    def forward() -> torch.Tensor:
        # gathered now
        head = model.get_output_embeddings()
        return loss_of(config, model, replace(layer, weight_VH=head.weight, bias_V=head.bias), tokens, scored, kind)

    shards = Shards(model, forward, World(0, mesh.size()), mesh, precision_of(config))
    optimizer = with_states(optimizer_of(shards.module(), config), shards.module())
    if accumulated:
        for weight in shards.whole.values():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    with held_by(shards.root, optimizer) as peak:
        torch.autograd.backward(shards.call(forward))
        shards.clip(config.train.max_grad_norm)
        step_all(optimizer)
        optimizer.zero_grad()
    return peak[0]


def with_states(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """`optimizer`, of weights of `model`, with the states that it has after a step, and no gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step_all(optimizer)
    optimizer.zero_grad()
    return optimizer


@contextmanager
def seeming(devices: int) -> Iterator[DeviceMesh]:
    """A row of as many processes, of which this one is the first and the others are not there: nothing is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=devices, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (devices,))
    finally:
        torch.distributed.destroy_process_group()


def _tracker(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    from torch.distributed._tools import fsdp2_mem_tracker, mem_tracker
    from torch.distributed.fsdp import FSDPModule

    whole_class: Any = mem_tracker.MemTracker
    parts_class: Any = fsdp2_mem_tracker.FSDPMemTracker

    class Nothing:
        def remove(self) -> None: ...

    class Whole(whole_class):  # type: ignore[misc]  # torch leaves it untyped
        """For weights that do not learn too."""

        _update_peak_stats = _only_the_whole_peak

        def _track_module_params_and_buffers(
            self,
            module: torch.nn.Module,
            install_grad_hooks: bool = True,  # noqa: FBT001, FBT002  # torch's signature
        ) -> tuple[int, int]:
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    # it would be asked for a hook on a gradient that it never has
                    self._param_to_grad_hook_handles[parameter] = (Nothing(), Nothing())
            tracked: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks)
            return tracked

    class Parts(parts_class):  # type: ignore[misc]
        _update_peak_stats = _only_the_whole_peak

    if isinstance(model, FSDPModule):
        return Parts(model, optimizer)
    tracker = Whole()
    tracker.track_external(*(part for part in (model, optimizer) if part is not None))
    return tracker


def _only_the_whole_peak(tracker: Any, _: Any) -> None:
    """In place of a tracker's own way, which also notes the peak of every module and takes most of its time so."""
    for device, snapshot in tracker._curr_mem_snap.items():  # noqa: SLF001  # the tracker's method
        if tracker._peak_mem.get(device, 0) < snapshot["Total"]:  # noqa: SLF001
            tracker._peak_mem[device], tracker._peak_mem_snap[device] = snapshot["Total"], dict(snapshot)  # noqa: SLF001
