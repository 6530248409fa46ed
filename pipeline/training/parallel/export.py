"""What many processes trained, as a Hugging Face directory: each weight is whole in turn, and written by the first process.

What is written is read again, each process its own parts, in place of the weights that were trained, and must give the same
outputs.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.forward.trees import Tree
from pipeline.training.checkpoint import read_parts
from pipeline.training.checks.export import CHECKED, must_agree, outputs_of
from pipeline.training.objectives.objective import objective_of
from pipeline.training.parallel.sharded import Shards, local_of
from pipeline.training.parallel.world import World
from pipeline.training.policies import Policy, precision_of
from pipeline.training.save import put_in_place, saved_dtype, write_adapter, write_beside
from pipeline.training.weights_files import are_converted, weights_of, write_configuration, write_weights

# before names of weights in files of adapters
_OF_ADAPTERS = "base_model.model."
# of the one adapter, as PEFT leaves it out of the names in files
_NAME = re.compile(r"\.default(?=\.|$)")


def can_export_parts(policy: Policy) -> bool:
    """Whether `Exports` can: not if transformers would convert weights, or a head is learned beside adapters."""
    if are_converted(policy.model):
        return False
    if policy.adapted is None:
        return True
    from peft.utils import ModulesToSaveWrapper

    return not any(isinstance(module, ModulesToSaveWrapper) for module in policy.model.modules())


@dataclass(frozen=True)
class Exports:
    """Saves the policy of `shards`, as `pipeline.training.save.save_policy` does one in one piece. All processes must call it."""

    policy: Policy
    shards: Shards
    base: Path
    config: Config
    run: Run
    world: World

    def save(self, card: str, tokenizer: Any, trees: Sequence[Tree]) -> dict[str, float]:
        """As `save_policy`."""
        policy, config = self.policy, self.config
        trees = trees[:CHECKED]
        trained = self._outputs(trees)
        kept_in = saved_dtype(config, self.base)
        coarse = {policy.model.dtype, kept_in, precision_of(config)} != {torch.float32}
        differences: dict[str, float] = {}

        def check(name: str, place: Path) -> Callable[[Path], None]:
            def checked(directory: Path) -> None:
                parts = self._in_files(name)
                for part in parts.values():
                    # what is not read is seen then
                    local_of(part).fill_(math.nan if part.is_floating_point() else 0)
                read_parts(directory, parts, group=self.world.group)
                again = self._outputs(trees)
                found = self.world.once(lambda: must_agree(again, place, trained, len(trees), coarse=coarse))
                differences[name] = found

            return checked

        def write_model(directory: Path) -> None:
            weights = self._merged() if config.policy.lora else self.shards.whole_weights(self.shards.whole)
            self.world.once(lambda: write_configuration(policy.model, directory, kept_in))
            write_weights(
                directory,
                self._in_files("model"),
                chain(weights, self._buffers().items()),
                kept_in,
                config.policy.max_shard_size,
                writes=self.world.first,
            )
            self.world.once(lambda: write_beside(policy.model, self.base, directory, card, tokenizer))

        if config.policy.lora is not None:
            self._put(self.run.adapter, lambda to: self._write_adapter(to, card), check("adapter", self.run.adapter))
            if not config.policy.lora.merge:
                self.world.once(lambda: shutil.rmtree(self.run.model, ignore_errors=True))
                return differences
        self._put(self.run.model, write_model, check("model", self.run.model))
        return differences

    def _outputs(self, trees: Sequence[Tree]) -> np.ndarray:
        return outputs_of(
            self.policy.model, trees, objective_of(self.config.train), self.shards.call, precision_of(self.config)
        )

    def _put(self, place: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
        """As `put_in_place`, by all processes."""
        temporary = Path(self.world.once(lambda: str(durable.temporary_directory(place))))
        try:
            with durable.explaining_disk(place):
                write(temporary)
            check(temporary)
            self.world.once(lambda: put_in_place(temporary, place))
        finally:
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _in_files(self, kind: str) -> dict[str, Any]:
        """What a `kind` of directory holds, by the names in its files; of a model, adapters are in the weights below them."""
        if kind == "adapter":
            return {
                _OF_ADAPTERS + _NAME.sub("", name): weight
                for name, weight in self.shards.whole.items()
                if ".lora_" in name
            }
        weights = {
            name.replace(".base_layer.", "."): weight
            for name, weight in self.shards.whole.items()
            if ".lora_" not in name
        }
        return weights | self._buffers()

    def _buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that files hold; each process has them whole."""
        return {name: buffer for name, buffer in weights_of(self.policy.model).items() if name not in self.shards.whole}

    def _write_adapter(self, directory: Path, card: str) -> None:
        names = [name for name in self.shards.whole if ".lora_" in name]
        whole = {f"{_OF_ADAPTERS}{name}": weight for name, weight in self.shards.whole_weights(names)}
        self.world.once(lambda: write_adapter(self.policy.adapted, directory, card, whole))

    def _merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight below the adapters, whole and with what its adapter adds, in float32; adapters add nothing more then."""
        from peft.tuners.lora import LoraLayer

        adapted = {name: module for name, module in self.policy.model.named_modules() if isinstance(module, LoraLayer)}
        for name, whole in self.shards.whole_weights([name for name in self.shards.whole if ".lora_" not in name]):
            module = adapted.get(name.removesuffix(".base_layer.weight"))
            if module is None:
                yield name, whole.float()
            else:
                yield (
                    name.replace(".base_layer.", "."),
                    whole.float() + self._delta(name.removesuffix("base_layer.weight"), module),
                )
        for module in adapted.values():
            module.scale_layer(0.0)

    def _delta(self, prefix: str, module: Any) -> torch.Tensor:
        """What PEFT would add to a layer's weight."""
        names = [name for name in self.shards.whole if name.startswith(prefix) and ".lora_" in name]
        owners = [
            (*_owner(module, name.removeprefix(prefix)), whole) for name, whole in self.shards.whole_weights(names)
        ]
        parts = [(parameters, field, parameters[field]) for parameters, field, _ in owners]
        try:
            for parameters, field, whole in owners:
                parameters[field] = torch.nn.Parameter(whole.float(), requires_grad=False)
            delta: torch.Tensor = module.get_delta_weight("default")
        finally:
            for parameters, field, part in parts:
                parameters[field] = part
        return delta


def _owner(module: torch.nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The table that holds a module's parameter of that name, and its name there."""
    path, _, field = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    return owner._parameters, field  # noqa: SLF001  # FSDP's own must be back in its place afterwards
