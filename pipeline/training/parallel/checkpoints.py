"""Checkpoints of a model in shards, by torch's distributed checkpoint (DCP): each process writes its own parts, as safetensors.

They are published as those of one process are: the first one writes state.json, with the digests of all files, when all others have
written theirs. Either kind is read by any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.artifacts import durable
from pipeline.training.checkpoint import POLICY_LOGPS, publish, sha256
from pipeline.training.parallel.world import Followed, World

# a file is made up in memory before it is written, so that a few small ones take less of it than a large one
_FILE_BYTES = 2**28


def save_parts(
    root: Path,
    step: int,
    training: str,
    tensors: Mapping[str, torch.Tensor],
    names: Iterable[str],
    keep: int,
    policy_logps: Mapping[str, torch.Tensor],
    world: World,
) -> Path:
    """Write this process's parts of `tensors`, and publish them with all others'; keeps the `keep` newest checkpoints.

    `names`: of the tensors of all processes. All must call it. Raises RefscoreError if the disk is full, Followed if it is another
    process's.
    """
    final = root / f"step_{step:06d}"
    temporary = Path(world.once(lambda: str(durable.temporary_directory(final))))
    try:
        with durable.explaining_disk(final):
            _write(temporary, tensors, names, world)
            own = world.everywhere(lambda: _made_durable(temporary, final, world))
            known = {name: digest for of_rank in world.all_of(own) for name, digest in of_rank.items()}

            def finish() -> None:
                if policy_logps:
                    save_file(dict(policy_logps), temporary / POLICY_LOGPS)
                publish(temporary, final, step, training, keep, known)

            world.once(finish)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write(directory: Path, tensors: Mapping[str, torch.Tensor], names: Iterable[str], world: World) -> None:
    """Write this process's parts; torch tells every process of a failure of any."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    files = _files(tensors, names, world)
    writer = dcp.HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=world.group)
    except dcp.api.CheckpointException as error:
        if world.first:
            raise next(iter(error.failures.values()))[0] from None
        raise Followed(1) from None


def _made_durable(directory: Path, final: Path, world: World) -> dict[str, str]:
    """Force this process's files to the disk; returns their digests, by name."""
    with durable.explaining_disk(final):
        durable.reached("checkpoint: parts written")
        # as torch names them
        mine = sorted(directory.glob(f"shard-{world.rank + 1:05d}-*.safetensors"))
        for file in mine:
            durable.flush(file)
        return {file.name: sha256(file) for file in mine}


def staged(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of `tensors` in the machine's memory, DTensors as such."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(plain)
    copied = stager.stage(dict(tensors))
    stager.close()
    return dict(copied)  # type: ignore[arg-type]  # not a future without use_async_staging


def _files(tensors: Mapping[str, torch.Tensor], names: Iterable[str], world: World) -> dict[str, int]:
    """For every name the number, from 1, of the file that it stands in; what the first process says counts for all."""
    sizes = {name: tensor.numel() * tensor.element_size() // world.size for name, tensor in tensors.items()}
    files, filled = {}, 0
    for name in sorted(names):
        filled += sizes.get(name, 0)
        files[name] = 1 + filled // _FILE_BYTES
    return files
