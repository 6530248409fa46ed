"""Checkpoints: everything a resumed training needs, as safetensors and JSON, published atomically.

`step_000050/` holds model.safetensors, optimizer.safetensors (float32, random state included), policy_logps.safetensors if the
training has any, and state.json, written last, with the digests of the others. A directory is whole or it is ignored: the
newest whole one wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts import durable
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# ends the name of a number that an optimizer keeps as a Python integer
INTEGER = ":integer"
_POLICY_LOGPS = "policy_logps.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its directory, the steps done, and the digest of the training it belongs to."""

    directory: Path
    step: int
    training: str


def save_checkpoint(
    root: Path,
    step: int,
    training: str,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    keep: int,
    policy_logps: Mapping[str, torch.Tensor] | None = None,
    whole: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the state of the weights that learn after `step` steps and remove all but the `keep` newest checkpoints.

    `policy_logps` is the state of `PolicyLogps`; `whole`: weights, and the rest, gathered from the processes that share the model.
    """
    final = root / f"step_{step:06d}"
    temporary = durable.temporary_beside(final)
    try:
        with durable.explaining_disk(final):
            temporary.mkdir(parents=True)
            durable.reached("checkpoint: begun")
            weights, rest = whole or (
                {name: p.detach().contiguous() for name, p in _learning(model)},
                _optimizer_tensors(model, optimizer),
            )
            save_file(dict(weights), temporary / "model.safetensors")
            durable.reached("checkpoint: weights written")
            save_file(dict(rest), temporary / "optimizer.safetensors")
            durable.reached("checkpoint: optimizer written")
            if policy_logps:
                save_file(dict(policy_logps), temporary / _POLICY_LOGPS)
            durable.reached("checkpoint: log-probabilities written")
            files = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            state: dict[str, Any] = {"step": step, "training": training, "files": files}
            state["digest"] = _digest_of(state)
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            durable.reached("checkpoint: state written")
            for file in temporary.iterdir():
                durable.flush(file)
            durable.reached("checkpoint: flushed")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            durable.reached("checkpoint: renamed")
            durable.flush(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(root.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in root.glob(f"{durable.TEMPORARY}*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    durable.reached("checkpoint: done")
    return final


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The whole checkpoint with the most steps; damaged ones are named in a warning and passed over."""
    for directory in sorted(root.glob("step_*"), reverse=True):
        try:
            state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
            if state.pop("digest") != _digest_of(state):
                raise ValueError("state.json changed since it was saved")
            damaged = [name for name, digest in state["files"].items() if _sha256(directory / name) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not whole (%s): passed over", directory, error)
            continue
        if damaged:
            log.warning("%s: %s changed since it was saved: passed over", directory, ", ".join(damaged))
            continue
        return Checkpoint(directory, int(state["step"]), str(state["training"]))
    return None


def load_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer and random state back, bit for bit. Raises DataError if they do not fit the model."""
    weights = load_file(checkpoint.directory / "model.safetensors")
    parameters = dict(_learning(model))
    if weights.keys() != parameters.keys():
        raise DataError(f"{checkpoint.directory} was saved from another model: start again with --restart")
    tensors = load_file(checkpoint.directory / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            # the fused optimizer keeps its step counter on the device too
            optimizer.state[parameter] = {
                key.removeprefix(f"{name}/").removesuffix(INTEGER): int(value)
                if key.endswith(INTEGER)
                else value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def load_policy_logps(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The state of `PolicyLogps`; empty if the checkpoint has none, as those of earlier versions."""
    path = checkpoint.directory / _POLICY_LOGPS
    return load_file(path) if path.exists() else {}


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    shared: set[int] = set()
    for name, parameter in _learning(model):
        for field, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                tensors[f"{name}/{field}{INTEGER}"] = torch.tensor(value)
                continue
            # 8-bit optimizers share tables between parameters; safetensors keeps no tensor twice
            again = value.data_ptr() in shared
            shared.add(value.data_ptr())
            tensors[f"{name}/{field}"] = value.detach().clone() if again else value.detach().contiguous()
    return tensors


def _learning(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _digest_of(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
