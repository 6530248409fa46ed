"""Index files become one, which speaks of each shard once: what readers and publishers of a place both do with its index."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.errors import RefscoreError, first_line
from pipeline.store.index.index_file import PAGE, Bytes, IndexFile, WrongIndex, by_key, index_name, write_index
from pipeline.store.shard import ShardFacts

log = logging.getLogger(__name__)

FOLDER = "index"
# what one index file is made for: so many shards that none covers, or so many rows
WORTH_SHARDS, WORTH_ROWS = 16, 100_000
# entries that are held in memory at a time; each takes 40 bytes, and twice that while it is sorted
AT_ONCE = 2**20
_LAST = 2**64 - 1


class Files(Protocol):
    """What a place does for its indexes; names are below the reference."""

    @property
    def name(self) -> str:
        """The place, for messages."""
        ...

    def bytes_of(self, name: str) -> Bytes:
        """A file, to be read in any order. Raises OSError."""
        ...

    def put(self, file: Path, name: str) -> None:
        """Make a local file visible as `name`, whatever stood there. Raises OSError or RefscoreError."""
        ...

    def remove(self, name: str) -> None:
        """Remove what stands under a name, if anything does. Raises RefscoreError if it may not be removed."""
        ...

    def workspace(self) -> Path:
        """A local directory in which to write."""
        ...

    def index_files(self) -> dict[str, int]:
        """Names (below FOLDER) and bytes of the index files that are there now; no shard is listed for it. Raises OSError or
        RefscoreError.
        """
        ...


@dataclass(frozen=True)
class Covering:
    """An index file and which of its shards (by its numbers) are to be looked for in it."""

    file: IndexFile
    ours: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of those shards."""
        return sum(shard.rows for shard, is_ours in zip(self.file.shards, self.ours.tolist(), strict=True) if is_ours)


def covering_all(files: Iterable[IndexFile], shards: Collection[str] | None = None) -> list[Covering]:
    """How shards are covered by the files, each by one: by the largest that knows it. `shards`: those that there are; None, all."""
    left = None if shards is None else set(shards)
    seen, covering = set[str](), []
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        names = [shard.name for shard in file.shards]
        ours = [name not in seen and (left is None or name in left) for name in names]
        covering.append(Covering(file, np.array(ours, dtype=bool)))
        seen.update(names)
    return covering


def merged_file(
    sources: Sequence[Covering], new: Callable[[], Path], read: Callable[[IndexFile, int, int], np.ndarray]
) -> tuple[Path, str]:
    """One file of what the sources cover, and its name; `new` gives the path. Raises OSError, and what `read` raises."""
    path, (shards, numbers) = new(), _together(sources)
    write_index(path, shards, _merged(sources, numbers, read))
    return path, index_name(shard.name for shard in shards)


def _together(sources: Sequence[Covering]) -> tuple[list[ShardFacts], list[np.ndarray]]:
    """The shards of several files; for each file the numbers that its shards have among them."""
    shards: list[ShardFacts] = []
    numbers = []
    for source in sources:
        numbers.append(np.cumsum(source.ours) - 1 + len(shards))
        shards += [shard for shard, ours in zip(source.file.shards, source.ours.tolist(), strict=True) if ours]
    return shards, numbers


def _merged(
    sources: Sequence[Covering], numbers: Sequence[np.ndarray], read: Callable[[IndexFile, int, int], np.ndarray]
) -> Iterator[np.ndarray]:
    """The entries of several files in order, about AT_ONCE at a time; `numbers`: what `_together` says."""
    fences = np.unique(np.concatenate([source.file.fences for source in sources]))
    lows = [0, *fences[:: AT_ONCE // PAGE][1:].tolist()]
    for low, high in zip(lows, [*(low - 1 for low in lows[1:]), _LAST], strict=True):
        parts = []
        for source, new in zip(sources, numbers, strict=True):
            entries = read(source.file, low, high)
            entries = entries[source.ours[entries[:, 4] >> np.uint64(32)]]
            shards = new[entries[:, 4] >> np.uint64(32)].astype(np.uint64)
            entries[:, 4] = shards << np.uint64(32) | entries[:, 4] & np.uint64(0xFFFFFFFF)
            parts.append(entries)
        entries = np.concatenate(parts)
        if len(entries):
            yield by_key(entries)


@contextmanager
def alone(place: Files) -> Iterator[bool]:
    """Whether nobody else on this machine makes an index at the place. Where there are no locks two may make the same one."""
    try:
        descriptor = os.open(place.workspace(), os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            nobody_else = True
        except OSError as error:
            nobody_else = not isinstance(error, BlockingIOError)
        yield nobody_else
    finally:
        os.close(descriptor)


def reading(place: Files) -> Callable[[IndexFile, int, int], np.ndarray]:
    """`IndexFile.between`, which removes a file that is damaged: its shards are covered by the next one that is made."""

    def read(file: IndexFile, low: int, high: int) -> np.ndarray:
        try:
            return file.between(low, high)
        except WrongIndex:
            removed(place, file.name)
            raise

    return read


def removed(place: Files, name: str) -> bool:
    """Remove an index file; whether that could be done."""
    try:
        place.remove(f"{FOLDER}/{name}")
    except RefscoreError as error:
        log.debug("the index %s/%s is not removed (%s)", place.name, name, first_line(error))
        return False
    return True
