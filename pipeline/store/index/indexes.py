"""The index files of one place: which shards they cover, and making them.

An index file never changes: it speaks of shards by name, so new shards are simply not covered by it, and what it says of removed
ones is passed over. Shards that no index covers are read by whoever asks. Were they many, what was read of them becomes an index
file, and small ones are merged with it, so that there are few: each is more than _TIMES as large as all smaller ones together.
Files that cover nothing any more are removed. All of that only where it can be written; where it cannot, questions take longer.
"""

from __future__ import annotations

import fcntl
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError, first_line
from pipeline.store.index.index_file import (
    PAGE,
    Bytes,
    IndexFile,
    LocalBytes,
    WrongIndex,
    by_key,
    entries_of,
    index_name,
    write_index,
)
from pipeline.store.shard import ShardFacts

log = logging.getLogger(__name__)

FOLDER = "index"
# what one index file is made for: so many shards that none covers, or so many rows
WORTH_SHARDS, WORTH_ROWS = 16, 100_000
# entries that are held in memory at a time; each takes 40 bytes, and twice that while it is sorted
_AT_ONCE = 2**20
_TIMES = 4
_LAST = 2**64 - 1
# notes of files that told lies and could not be removed
_REFUSED = durable.CACHE / "refused"


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


@dataclass(frozen=True)
class Covering:
    """An index file and which of its shards (by its numbers) are to be looked for in it."""

    file: IndexFile
    ours: np.ndarray

    @property
    def rows(self) -> int:
        """Rows of those shards."""
        return sum(shard.rows for shard, is_ours in zip(self.file.shards, self.ours.tolist(), strict=True) if is_ours)


class Indexes:
    """See the module. What was opened stays open for the next question."""

    def __init__(self, place: Files) -> None:
        # the place owns this: a reference back would keep files open after it
        self._place: Files = weakref.proxy(place)
        self._opened: dict[str, IndexFile] = {}
        self._refused: set[str] = set()
        self._writable = True

    def covering(self, names: Collection[str], shards: Sequence[str]) -> tuple[list[Covering], list[str]]:
        """How `shards` are covered by the index files called `names`, each by one; and those that none covers.

        Raises FileNotFoundError if a file is gone.
        """
        self._opened = {name: file for name in names if (file := self._opened.get(name) or self._open(name))}
        left, covering = set(shards), []
        for file in sorted(self._opened.values(), key=lambda file: (-file.size, file.name)):
            covering.append(Covering(file, np.array([shard.name in left for shard in file.shards], dtype=bool)))
            left.difference_update(shard.name for shard in file.shards)
        return covering, sorted(left)

    def refuse(self, file: IndexFile, problem: str, *, lies: bool = False) -> None:
        """Use a file no more, and remove it if that can be done; one that `lies` in the next processes neither."""
        log.warning(
            "the index %s/%s is wrong (%s): it is not used, and made again", self._place.name, file.name, problem
        )
        self._opened.pop(file.name, None)
        self._refused.add(_mark(file))
        if not _removed(self._place, file.name) and lies:
            with suppress(OSError):
                _REFUSED.mkdir(parents=True, exist_ok=True)
                (_REFUSED / _mark(file)).touch()

    @contextmanager
    def building(self, covering: Sequence[Covering]) -> Iterator[Building]:
        """Hears what is read of shards that are not covered, and makes an index of it at the end, if it is worth it and can be
        done. `covering`: the index files that there are.
        """
        with _alone(self._place) as alone:
            building = Building(self._place, covering, wanted=alone and self._writable)
            try:
                yield building
                building.finish()
            finally:
                building.clear()
        self._writable = self._writable and not building.refused
        if building.made:
            # one that was damaged and is made anew has the same content
            self._refused = {mark for mark in self._refused if not mark.startswith(building.made)}

    def _open(self, name: str) -> IndexFile | None:
        try:
            file = IndexFile(name, self._place.bytes_of(f"{FOLDER}/{name}"))
        except FileNotFoundError:
            raise
        except OSError as error:
            log.debug("the index %s/%s is not used (%s)", self._place.name, name, first_line(error))
            return None
        except WrongIndex as wrong:
            log.debug("the index %s/%s is not used (%s)", self._place.name, name, wrong)
            _removed(self._place, name)
            return None
        return None if _mark(file) in self._refused or (_REFUSED / _mark(file)).exists() else file


class Building:
    """Makes one index file of shards that none covers, and of files that are small beside it. Where that fails nothing happens."""

    def __init__(self, place: Files, covering: Sequence[Covering], *, wanted: bool) -> None:
        self._place, self._covering = place, covering
        self._shards: list[ShardFacts] = []
        self._entries: list[np.ndarray] = []
        self._runs: list[Path] = []
        self._fresh: list[Covering] = []
        self.made, self.refused = "", False
        self._over = not wanted

    def add(self, shard: ShardFacts, words: np.ndarray) -> None:
        """The keys of one shard, in the order of its rows."""
        if self._over:
            return
        with self._or_not():
            self._entries.append(entries_of(words, len(self._shards)))
            self._shards.append(shard)
            if sum(map(len, self._entries)) >= _AT_ONCE:
                self._set_down()

    def finish(self) -> None:
        """Make the index, if there is enough for one."""
        rows, number = sum(map(len, self._entries)), len(self._shards)
        if self._over or not (self._runs or number >= WORTH_SHARDS or rows >= WORTH_ROWS):
            return
        with self._or_not():
            if self._shards:
                self._set_down()
            merged = self._to_merge()
            path, name = self._runs[0], self._fresh[0].file.name
            if len(self._fresh + merged) > 1:
                path, (shards, numbers) = self._new(), _together(self._fresh + merged)
                name = index_name(shard.name for shard in shards)
                write_index(path, shards, _merged(self._fresh + merged, numbers, self._read))
            self._place.put(path, f"{FOLDER}/{name}")
            self.made = name
            durable.reached("index: put")
            for old in self._covering:
                if old.file.name != name and (old.file in [one.file for one in merged] or not old.ours.any()):
                    _removed(self._place, old.file.name)

    def clear(self) -> None:
        """Remove the working files."""
        for path in self._runs:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _set_down(self) -> None:
        path = self._new()
        write_index(path, self._shards, [by_key(np.concatenate(self._entries))])
        file = IndexFile(index_name(shard.name for shard in self._shards), LocalBytes(path))
        self._fresh.append(Covering(file, np.ones(len(self._shards), dtype=bool)))
        self._shards, self._entries = [], []

    def _new(self) -> Path:
        path = durable.temporary_beside(self._place.workspace() / "keys.index")
        self._runs.append(path)
        return path

    def _to_merge(self) -> list[Covering]:
        """Those of the files there that are not much larger than what comes, or that speak of removed shards in the main."""
        rows, chosen = sum(one.rows for one in self._fresh), []
        for old in sorted(self._covering, key=lambda old: old.rows):
            if old.rows and (old.rows <= _TIMES * rows or 2 * old.rows < old.file.size):
                chosen.append(old)
                rows += old.rows
        return chosen

    def _read(self, file: IndexFile, low: int, high: int) -> np.ndarray:
        try:
            return file.between(low, high)
        except WrongIndex:
            # its shards are covered by none from now on, and so by the next one that is made
            _removed(self._place, file.name)
            raise

    @contextmanager
    def _or_not(self) -> Iterator[None]:
        try:
            yield
            return
        except (FileNotFoundError, WrongIndex) as error:
            problem: Exception = error
        except (OSError, RefscoreError) as error:
            problem, self.refused = error, True
        log.debug("no index is made at %s (%s)", self._place.name, first_line(problem))
        self._over = True


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
    """The entries of several files in order, about _AT_ONCE at a time; `numbers`: what `_together` says."""
    fences = np.unique(np.concatenate([source.file.fences for source in sources]))
    lows = [0, *fences[:: _AT_ONCE // PAGE][1:].tolist()]
    for low, high in zip(lows, [*(low - 1 for low in lows[1:]), _LAST], strict=True):
        parts = []
        for source, new in zip(sources, numbers, strict=True):
            entries = read(source.file, low, high)
            entries = entries[source.ours[entries[:, 4] >> np.uint64(32)]]
            shards = new[entries[:, 4] >> np.uint64(32)].astype(np.uint64)
            entries[:, 4] = shards << np.uint64(32) | entries[:, 4] & np.uint64(0xFFFFFFFF)
            parts.append(entries)
        together = np.concatenate(parts)
        if len(together):
            yield by_key(together)


@contextmanager
def _alone(place: Files) -> Iterator[bool]:
    """Whether nobody else on this machine makes an index at the place. Where there are no locks two may make the same one."""
    try:
        descriptor = os.open(place.workspace(), os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError as error:
            alone = not isinstance(error, BlockingIOError)
        yield alone
    finally:
        os.close(descriptor)


def _removed(place: Files, name: str) -> bool:
    try:
        place.remove(f"{FOLDER}/{name}")
    except RefscoreError as error:
        log.debug("the index %s/%s is not removed (%s)", place.name, name, first_line(error))
        return False
    return True


def _mark(file: IndexFile) -> str:
    """What a file's content is known by."""
    return f"{file.name}-{file.checksum:08x}"
