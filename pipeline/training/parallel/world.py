"""The processes of one training, as torchrun starts them. One alone is a world of size 1, in which nothing is sent.

The first process writes all files and speaks; what it finds before the first step the others are told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.errors import OtherGone, RefscoreError
from pipeline.hardware import device_kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Made = TypeVar("Made")
# a process that is gone is noticed by torchrun, which ends the others; what takes long is the first one's writing
_PATIENCE = timedelta(hours=12)


# what gloo says when a process that it sends to is gone
_GONE = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


class Followed(RefscoreError):
    """Another process failed and has said why; this one ends with the same code and says nothing."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.exit_code = code


@dataclass(frozen=True)
class World:
    """This process's number `rank`, from 0, among `size`. `group`: what sends between them; None: what a step sends by."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of `values`, which every process must give in the same shape."""
        if self.alone:
            return values
        summed = values.clone()
        torch.distributed.all_reduce(summed, group=self.group)
        return summed

    def gathered(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The values of every process, of one shape, in the order of their ranks."""
        if self.alone:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values, group=self.group)
        return parts

    def all_of(self, value: Any) -> list[Any]:
        """The `value`, one for JSON, of every process, in the order of their ranks."""
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.place)
        lengths = [int(length) for length in self.gathered(torch.tensor([len(content)], device=self.place))]
        padded = torch.nn.functional.pad(content, (0, max(lengths) - len(content)))
        parts = zip(self.gathered(padded), lengths, strict=True)
        return [json.loads(part[:length].cpu().numpy().tobytes()) for part, length in parts]

    def everywhere(self, do: Callable[[], Made]) -> Made:
        """What `do`, called in every process, returns here, once all have done it: what one of them does next, or tidies because it
        failed, disturbs no other.

        Raises what `do` raises here. If it raised elsewhere, the first process raises what was said there, as it is the one that
        speaks, and every other Followed.
        """
        try:
            made = do()
        except RefscoreError as error:
            self.all_of([error.exit_code, str(error)])
            if self.first:
                raise
            raise Followed(error.exit_code) from None
        except Exception:
            self.all_of([1, ""])
            raise
        failed = [found for found in self.all_of(None) if found is not None]
        if not failed:
            return made
        code, said = failed[0]
        raise RefscoreError(said) if self.first and said else Followed(code)

    def aside(self) -> World:
        """The same processes, which send by the machine's memory and beside a step; all of them must call it."""
        if self.alone:
            return self
        return replace(self, group=torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def place(self) -> torch.device:
        """Where what is sent must lie."""
        return torch.device(device_kind() if self.group is None else "cpu")

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """What `make` returns, called in one process of each machine after the other, so that only one takes the memory for it."""
        if self.alone:
            return make()
        # what starts processes without torchrun may not say which share a machine: then all take turns
        here = int(os.environ.get("LOCAL_RANK", self.rank))
        most = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        made: list[Made] = []
        for turn in range(max(int(size) for size in self.gathered(torch.tensor([most], device=self.place)))):
            if turn == here:
                made.append(make())
            torch.distributed.barrier(self.group)
        return made[0]

    def once(self, find: Callable[[], Any]) -> Any:
        """What `find`, called in the first process alone, returns, a value for JSON; every process gets it.

        Raises what `find` raises in the first process, and Followed in the others.
        """
        if self.alone:
            return find()
        told: dict[str, Any]
        if self.first:
            try:
                told = {"found": find()}
            except Exception as error:
                self._tell({"failed": getattr(error, "exit_code", 1)})
                raise
            self._tell(told)
        else:
            told = self._told()
            if "failed" in told:
                raise Followed(told["failed"])
        return told["found"]

    def _tell(self, told: dict[str, Any]) -> None:
        content = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        for tensor in (torch.tensor([len(content)]), content):
            torch.distributed.broadcast(tensor.to(self.place), 0, group=self.group)

    def _told(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64, device=self.place)
        torch.distributed.broadcast(length, 0, group=self.group)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.place)
        torch.distributed.broadcast(content, 0, group=self.group)
        told: dict[str, Any] = json.loads(content.cpu().numpy().tobytes())
        return told


ALONE = World()


@contextmanager
def world() -> Iterator[World]:
    """The world that torchrun, or srun with its variables, put this process in: NCCL between GPUs, gloo between processors."""
    size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if size == 1:
        yield ALONE
        return
    if device_kind() == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device_kind() == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield World(rank, size)
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _GONE):
            raise OtherGone from None
        raise
    # not after a failure: the others may wait for this process elsewhere
    torch.distributed.destroy_process_group()
