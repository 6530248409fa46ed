"""Training in less memory: activations in the machine's memory, no gradient kept.

The optimizer's step inside the backward pass (LOMO, Lv et al. 2023, 2306.09782, with a stateful optimizer as torchtune has it)
updates a weight as soon as its gradient is complete and drops the gradient at once, so that only one exists at a time. Then a
step is one forward pass, nothing is clipped, and a loss that is not finite is noticed after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.training.optimizers import step_one

# smaller tensors stay on the device: moving them costs more than it gains
OFFLOADED_BYTES = 2**20


@contextmanager
def offloaded_activations(model: torch.nn.Module) -> Iterator[None]:
    """While it is entered, what a forward pass keeps for its backward pass waits in the machine's memory, but weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        small = tensor.numel() * tensor.element_size() < OFFLOADED_BYTES
        if small or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        # in the order of the device's work: neither side waits for the other
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def unpack(packed: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class StepInBackward:
    """Updates every weight as soon as its gradient is complete. The groups' learning rates must be set before the backward pass.

    `grad_norm` is the norm of all gradients since it was last asked for, on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._squares = optimizer, list[torch.Tensor]()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(group))

    def grad_norm(self) -> torch.Tensor:
        """The norm of the gradients of the backward pass that is over, a scalar; asked again, it is of those since then."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt()

    def _hook(self, group: dict[str, Any]) -> Callable[[torch.nn.Parameter], None]:
        def update(parameter: torch.nn.Parameter) -> None:
            gradient: Any = parameter.grad
            self._squares.append(gradient.float().square().sum())
            step_one(self._optimizer, group, parameter)
            parameter.grad = None

        return update
