"""Writes the checkpoints of a training: at once, or while the next steps are taken, from a copy in the machine's memory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from pipeline.artifacts import durable
from pipeline.config.training import TrainConfig
from pipeline.hardware import device_kind, free_memory
from pipeline.training.checkpoint import save_checkpoint, state_of
from pipeline.training.parallel.checkpoints import save_parts, staged
from pipeline.training.parallel.sharded import Shards
from pipeline.training.parallel.state import names_of_all, state
from pipeline.training.parallel.world import World
from pipeline.training.policies import Policy


class Saver:
    """Checkpoints below `root`, of a `training` with that digest. All processes of `world` must make one, and call it alike."""

    def __init__(self, root: Path, training: str, train: TrainConfig, world: World) -> None:
        self._root, self._training, self._train = root, training, train
        self._world, self._aside = world, world.aside()
        self._writing: threading.Thread | None = None
        self._failed: BaseException | None = None
        if world.first:
            # of a process that was killed while it wrote: the next one needs the room
            for leftover in root.glob(f"{durable.TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        policy: Policy,
        shards: Shards | None,
        optimizer: torch.optim.Optimizer,
        policy_logps: Mapping[str, torch.Tensor],
        *,
        last: bool,
    ) -> None:
        """Save what there is after `step` steps; the `last` one is written when this returns. The one before is written then."""
        self.wait()
        write: Callable[[], object]
        keep, logps = self._train.save_total_limit, dict(policy_logps)
        if shards is None:
            weights, rest = state_of(policy.model, optimizer)
            behind = not last and self._behind([*weights.values(), *rest.values()])
            whole = (copied(weights), copied(rest)) if behind else (weights, rest)
            root, training = self._root, self._training

            def write() -> object:
                return save_checkpoint(root, step, training, policy.model, optimizer, keep, logps, whole)
        else:
            tensors = state(shards, optimizer, self._world)
            names = names_of_all(tensors, self._world)
            behind = not last and all(self._world.all_of(self._behind(tensors.values())))
            kept = staged(tensors) if behind else tensors

            def write() -> object:
                return save_parts(self._root, step, self._training, kept, names, keep, logps, self._aside)

        if not behind:
            write()
            return
        self._writing = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._writing.start()

    def wait(self) -> None:
        """Return when what was begun is written. Raises what went wrong."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failed is not None:
            raise self._failed

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001  # it is raised where the training waits
            self._failed = error

    def _behind(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether a copy of `tensors` is written later."""
        if self._train.async_save != "auto":
            return self._train.async_save
        if device_kind() != "cuda":
            return False
        # files are made up in memory too, and all processes of a machine share it
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) // self._world.size
        return 2 * here * size <= free_memory()


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy in the machine's memory."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
