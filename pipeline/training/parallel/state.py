"""What the processes of a training keep of weights, optimizer and chance, under the names that a checkpoint has for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import DataError
from pipeline.training.checkpoint import INTEGER, OF_RANK, Checkpoint, as_kept, must_be_of, read_parts, stored_tensors
from pipeline.training.parallel.sharded import Shards, local_of
from pipeline.training.parallel.world import World

# weights that one scale of bitsandbytes' 8-bit states is of
_BLOCK = 256
# weights in a tensor from which on it keeps 8 bits
_IN_BLOCKS = 4096


def state(shards: Shards, optimizer: torch.optim.Optimizer, world: World) -> dict[str, torch.Tensor]:
    """Parts of weights and of the optimizer's state as DTensors, the rest as it is; nothing is copied."""
    tensors: dict[str, torch.Tensor] = {}
    for name, part in shards.learning.items():
        tensors[name] = shards.whole[name].detach()
        for field, value in optimizer.state.get(part, {}).items():
            key = f"{name}/{field}"
            if not isinstance(value, torch.Tensor):
                tensors[key + INTEGER] = torch.tensor(value)
            elif _is_common(field, value.shape):
                # the same in all processes; tables are shared by all weights
                tensors[key] = value.clone()
            elif (spread := _spread(shards, name, part, field, value, optimizer)) is not None:
                tensors[key] = spread
            else:
                tensors[f"{key}{OF_RANK}{world.rank}"] = value
    tensors[_chance("cpu", world.rank)] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[_chance("cuda", world.rank)] = torch.cuda.get_rng_state()
    return tensors


def load_parts(shards: Shards, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Take this process's parts of a checkpoint, whatever number of processes wrote it. Only these parts are read.

    Raises DataError if it does not fit the model, or is of as many processes as wrote it alone.
    """
    stored = stored_tensors(checkpoint, shards.learning)
    must_be_of(checkpoint, stored, world.size)
    tensors = {name: shards.whole[name].detach() for name in shards.learning}
    fields: dict[str, dict[str, str]] = {name: {} for name in shards.learning}
    for key, (size, dtype) in stored.items():
        name, _, field = key.rpartition("/")
        field, _, rank = field.partition(OF_RANK)
        if name in fields and rank in ("", str(world.rank)):
            fields[name][field] = key
            like, device = shards.whole[name], shards.learning[name].device
            if rank or _is_common(field, size):
                tensors[key] = torch.empty(size, dtype=dtype, device=device)
                continue
            local = _local_shape(like, field, size)
            if local is None:
                raise DataError(
                    f"{checkpoint.directory}: the state of the optimizer is in blocks that {world.size} devices cannot share: go "
                    "on with as many as wrote it (--devices), or start again with --restart"
                )
            tensors[key] = _dtensor(torch.empty(local, dtype=dtype, device=device), like, size)
    ranks = sum(key.startswith("random/cpu") for key in stored)
    mine = (
        [key for kind in ("cpu", "cuda") if (key := _chance(kind, world.rank)) in stored] if ranks == world.size else []
    )
    tensors |= {key: torch.empty(stored[key][0], dtype=stored[key][1]) for key in mine}
    read_parts(checkpoint.directory, tensors, group=world.group)
    for name, part in shards.learning.items():
        optimizer.state[part] = {
            field.removesuffix(INTEGER): as_kept(field, local_of(tensors[key])) for field, key in fields[name].items()
        }
    if not mine:
        # of another number of processes: chance begins anew, another in each
        torch.manual_seed(torch.initial_seed() + 1_000_003 * checkpoint.step + world.rank)
        return
    torch.set_rng_state(tensors[mine[0]])
    if len(mine) > 1:
        torch.cuda.set_rng_state(tensors[mine[1]])


def names_of_all(tensors: dict[str, torch.Tensor], world: World) -> list[str]:
    """The names of what all processes keep."""
    return sorted({name for names in world.all_of(list(tensors)) for name in names})


def _spread(
    shards: Shards, name: str, part: torch.Tensor, field: str, value: torch.Tensor, optimizer: torch.optim.Optimizer
) -> torch.Tensor | None:
    """`value`, of this process's part of a weight, as a part of one of the whole; None if blocks of it would lie in two."""
    like: Any = shards.whole[name]
    # all processes must decide alike, so by the whole
    rows, ranks = like.shape[0], like.device_mesh.size()
    by_weight = isinstance(optimizer, torch.optim.AdamW) or -(-rows // ranks) * math.prod(like.shape[1:]) < _IN_BLOCKS
    if value.shape == part.shape and (rows % ranks == 0 or by_weight):
        return _dtensor(value, like, like.shape)
    size = torch.Size([like.numel() // _BLOCK])
    return _dtensor(value, like, size) if list(value.shape) == _local_shape(like, field, size) else None


def _is_common(field: str, size: Sequence[int]) -> bool:
    """Whether a field is the same in all processes: a number, or the table of an 8-bit code."""
    return len(size) == 0 or field.startswith("qmap")


def _local_shape(like: Any, field: str, size: torch.Size) -> list[int] | None:
    """The shape of this process's part of a field of `size` that belongs to the weight `like`; None if it has no part."""
    if size == like.shape:
        return list(like.to_local().shape)
    # a scale for each block, which must lie in one process
    ranks, blocks = like.device_mesh.size(), like.numel() // _BLOCK
    even = like.shape[0] % ranks == 0 and math.prod(like.shape[1:]) % _BLOCK == 0
    return [blocks // ranks] if even and list(size) == [blocks] and field.startswith("absmax") else None


def _dtensor(local: torch.Tensor, like: Any, size: torch.Size) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    stride = [1] * len(size)
    for place in range(len(size) - 2, -1, -1):
        stride[place] = stride[place + 1] * size[place + 1]
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=size, stride=tuple(stride)
    )


def _chance(kind: str, rank: int) -> str:
    return f"random/{kind}/{rank}" if rank else f"random/{kind}"
