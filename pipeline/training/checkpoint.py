"""Checkpoints: everything a resumed training needs, as safetensors and JSON, published atomically.

`step_000050/` holds model.safetensors, optimizer.safetensors (float32, random state included), policy_logps.safetensors if the
training has any, and state.json, written last, with the digests of the others. Many processes write parts of the first two
(`pipeline.training.parallel.checkpoints`). A directory is whole or it is ignored: the newest whole one wins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts import durable
from pipeline.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# ends the name of a number that an optimizer keeps as a Python integer
INTEGER = ":integer"
# comes before the number of the process whose own a tensor is
OF_RANK = "@"
POLICY_LOGPS = "policy_logps.safetensors"


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
    copied: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Write the state of the weights that learn after `step` steps and remove all but the `keep` newest checkpoints.

    `policy_logps` is the state of `PolicyLogps`; `copied`: what `state_of` said then.
    """
    final = root / f"step_{step:06d}"
    temporary = durable.temporary_beside(final)
    try:
        with durable.explaining_disk(final):
            temporary.mkdir(parents=True)
            durable.reached("checkpoint: begun")
            weights, rest = copied or state_of(model, optimizer)
            save_file(dict(weights), temporary / "model.safetensors")
            durable.reached("checkpoint: weights written")
            save_file(dict(rest), temporary / "optimizer.safetensors")
            durable.reached("checkpoint: optimizer written")
            if policy_logps:
                save_file(dict(policy_logps), temporary / POLICY_LOGPS)
            durable.reached("checkpoint: log-probabilities written")
            publish(temporary, final, step, training, keep)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def state_of(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that learn, and the state of the optimizer and of chance; not copied."""
    return {name: p.detach().contiguous() for name, p in _learning(model)}, _optimizer_tensors(model, optimizer)


def publish(
    temporary: Path, final: Path, step: int, training: str, keep: int, known: Mapping[str, str] | None = None
) -> None:
    """Put what was written to `temporary` in the place of `final`, with its state.json, and remove all but the `keep` newest.

    `known`: digests of files that are on the disk already.
    """
    files = dict(known or {})
    for file in sorted(temporary.iterdir()):
        if file.name not in files:
            files[file.name] = sha256(file)
            durable.flush(file)
    state: dict[str, Any] = {"step": step, "training": training, "files": dict(sorted(files.items()))}
    state["digest"] = _digest_of(state)
    written = temporary / "state.json"
    written.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    durable.reached("checkpoint: state written")
    durable.flush(written)
    durable.flush(temporary)
    durable.reached("checkpoint: flushed")
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    durable.reached("checkpoint: renamed")
    durable.flush(final.parent)
    # those of later steps were damaged, as this training did not go on from them
    steps = [directory for directory in _by_step(final.parent) if step_of(directory) <= step]
    for old in {*_by_step(final.parent)} - {*steps[-keep:]}:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in final.parent.glob(f"{durable.TEMPORARY}*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    durable.reached("checkpoint: done")


def step_of(directory: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(directory.name.removeprefix("step_"))


def _by_step(root: Path) -> list[Path]:
    return sorted((path for path in root.glob("step_*") if path.name[5:].isdigit()), key=step_of)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The whole checkpoint with the most steps; damaged ones are named in a warning and passed over."""
    for directory in reversed(_by_step(root)):
        try:
            state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
            if state.pop("digest") != _digest_of(state):
                raise ValueError("state.json changed since it was saved")
            damaged = [name for name, digest in state["files"].items() if sha256(directory / name) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not whole (%s): passed over", directory, error)
            continue
        if damaged:
            log.warning("%s: %s changed since it was saved: passed over", directory, ", ".join(damaged))
            continue
        return Checkpoint(directory, int(state["step"]), str(state["training"]))
    return None


def load_checkpoint(checkpoint: Checkpoint, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, optimizer and random state back, bit for bit, whatever number of processes wrote them.

    Raises DataError if they do not fit the model, or are of as many processes as wrote them alone.
    """
    parameters = dict(_learning(model))
    stored = stored_tensors(checkpoint, parameters.keys())
    must_be_of(checkpoint, stored, 1)
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for key, (size, dtype) in stored.items():
        name = key.rpartition("/")[0]
        if name in parameters:
            # the fused optimizer keeps its step counter on the device too
            tensors[key] = torch.empty(size, dtype=dtype, device=parameters[name].device)
        elif key in ("random/cpu", "random/cuda"):
            tensors[key] = torch.empty(size, dtype=dtype)
    read_parts(checkpoint.directory, tensors, alone=True)
    for name, parameter in parameters.items():
        fields = [key.removeprefix(f"{name}/") for key in tensors if key.startswith(f"{name}/")]
        optimizer.state[parameter] = {
            field.removesuffix(INTEGER): as_kept(field, tensors[f"{name}/{field}"]) for field in fields
        }
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def stored_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and dtypes of what a checkpoint holds, each in whole. DataError if its weights are not those of `names`."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    found = dcp.HuggingFaceStorageReader(str(checkpoint.directory)).read_metadata().state_dict_metadata
    stored = {name: (known.size, known.properties.dtype) for name, known in found.items()}
    if {name for name in stored if "/" not in name} != set(names):
        raise DataError(f"{checkpoint.directory} was saved from another model: start again with --restart")
    return stored


def must_be_of(checkpoint: Checkpoint, stored: Iterable[str], size: int) -> None:
    """Raise DataError if a process of a world of another `size` kept what cannot be spread over this one."""
    ranks = {int(key.rpartition(OF_RANK)[2]) for key in stored if OF_RANK in key}
    if ranks and len(ranks) != size:
        raise DataError(
            f"{checkpoint.directory}: {len(ranks)} devices kept the state of their optimizer in blocks that {size} cannot share: "
            f"go on with --devices {len(ranks)}, or start again with --restart"
        )


def read_parts(
    directory: Path,
    parts: Mapping[str, torch.Tensor],
    *,
    group: Any = None,
    alone: bool = False,
    files: Sequence[Path] = (),
) -> None:
    """Fill tensors, whole or DTensors, with what the safetensors files of `directory` hold under their names, be it in parts too,
    by torch's distributed checkpoint. All processes of `group` must call it; `alone`: this one needs no other. `files`: those that
    are read, if not all.

    Raises DataError if a name is missing, a shape is another or a file is damaged.
    """
    dcp: Any = import_module("torch.distributed.checkpoint")
    try:
        with warnings.catch_warnings():
            # one process is what was asked for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = dcp.HuggingFaceStorageReader(str(directory))
            if files:
                reader.fs.ls = lambda _: [str(file) for file in files]
            dcp.load(dict(parts), storage_reader=reader, process_group=group, no_dist=alone)
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise DataError(f"{directory} cannot be read: {first_line(reason)}") from None


def as_kept(field: str, value: torch.Tensor) -> Any:
    """The value of an optimizer's field, from what a checkpoint says of it."""
    return int(value) if field.endswith(INTEGER) else value


def load_policy_logps(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The state of `PolicyLogps`; empty if the checkpoint has none, as those of earlier versions."""
    path = checkpoint.directory / POLICY_LOGPS
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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
