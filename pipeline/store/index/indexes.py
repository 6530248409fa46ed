"""The index files of one place: which shards they cover, and making them.

An index file never changes: it speaks of shards by name, so new shards are simply not covered by it, and what it says of removed
ones is passed over. Who publishes shards adds them (`publishing`). Those that no index covers are read by whoever asks. Were they
many, what was read of them becomes an index file, and small ones are merged with it, so that there are few: each is more than
_TIMES as large as all smaller ones together. Files that cover nothing any more are removed. All of that only where it can be
written; where it cannot, questions take longer.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError, first_line
from pipeline.store.index.index_file import (
    IndexFile,
    LocalBytes,
    WrongIndex,
    by_key,
    entries_of,
    index_name,
    write_index,
)
from pipeline.store.index.merging import (
    AT_ONCE,
    FOLDER,
    WORTH_ROWS,
    WORTH_SHARDS,
    Covering,
    Files,
    alone,
    covering_all,
    merged_file,
    reading,
    removed,
)
from pipeline.store.index.publishing import Additions
from pipeline.store.shard import ShardFacts

log = logging.getLogger(__name__)

_TIMES = 4
# so often is an index file looked for that is listed
_TRIES = 5
# notes of index files that were wrong and could not be removed
_REFUSED = durable.CACHE / "refused"


class Indexes:
    """See the module. What was opened stays open for the next question."""

    def __init__(self, place: Files) -> None:
        # the place owns this: a reference back would keep files open after it
        self._place: Files = weakref.proxy(place)
        self._opened: dict[str, IndexFile] = {}
        self._refused: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._writable = True
        self._additions = Additions(self._place)

    def covering(self, names: Collection[str], shards: Sequence[str]) -> tuple[list[Covering], list[str]]:
        """How `shards` are covered by the index files called `names`, each by one; and those that none covers.

        Raises FileNotFoundError if a file is gone, after all others were opened; one that is listed for ever and never there is in
        the end left out.
        """
        opened, gone = dict[str, IndexFile](), None
        for name in names:
            try:
                if file := self._opened.get(name) or self._open(name):
                    opened[name] = file
            except FileNotFoundError as error:
                gone = error if self.is_worth_a_try(name) else gone
        self._opened = opened
        if gone is not None:
            raise gone
        covered = {shard.name for file in self._opened.values() for shard in file.shards}
        self._additions.forget(covered)
        return covering_all(self._opened.values(), shards), sorted(set(shards) - covered)

    def facts_of(self, names: Collection[str]) -> dict[str, ShardFacts]:
        """What the index files called `names` say of their shards, by name, as far as they can be read; nothing was checked."""
        facts: dict[str, ShardFacts] = {}
        for name in names:
            with suppress(FileNotFoundError):
                if file := self._opened.get(name) or self._open(name):
                    facts |= {shard.name: shard for shard in file.shards}
        return facts

    def published(self, shard: Path, name: str) -> None:
        """A shard was published as `name`, of which `shard` is a local copy: the index will speak of it. See `publishing`."""
        if self._additions.add(shard, name):
            self.finish()

    def finish(self) -> None:
        """Have the index speak of all that was published here."""
        self._additions.write(self._open)

    def leave_out(self, file: IndexFile) -> None:
        """Use a file no more in this process, and let it stand."""
        self._opened.pop(file.name, None)
        self._refused.add(_mark(file))

    def is_worth_a_try(self, name: str) -> bool:
        """Whether an index file that was listed and not to be had just now is to be looked for again."""
        self._failures[name] += 1
        return self._failures[name] < _TRIES

    def refuse(self, file: IndexFile, problem: str, *, lies: bool = False) -> None:
        """Use a file no more, and remove it if that can be done; one that `lies` in the next processes neither."""
        log.warning(
            "the index %s/%s/%s is wrong (%s): it is not used, and made again if the place can be written",
            self._place.name,
            FOLDER,
            file.name,
            problem,
        )
        self.leave_out(file)
        if not removed(self._place, file.name) and lies:
            with suppress(OSError):
                _REFUSED.mkdir(parents=True, exist_ok=True)
                (_REFUSED / _mark(file)).touch()

    @contextmanager
    def building(self, covering: Sequence[Covering]) -> Iterator[Building]:
        """Hears what is read of shards that are not covered, and makes an index of it at the end, if it is worth it and can be
        done. `covering`: the index files that there are.
        """
        with alone(self._place) as nobody_else:
            building = Building(self._place, covering, wanted=nobody_else and self._writable)
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
            removed(self._place, name)
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
            if sum(map(len, self._entries)) >= AT_ONCE:
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
                path, name = merged_file(self._fresh + merged, self._new, reading(self._place))
            self._place.put(path, f"{FOLDER}/{name}")
            self.made = name
            durable.reached("index: put")
            for old in self._covering:
                if old.file.name != name and (old.file in [one.file for one in merged] or not old.ours.any()):
                    removed(self._place, old.file.name)

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


def _mark(file: IndexFile) -> str:
    """What a file's content is known by."""
    return f"{file.name}-{file.checksum:08x}"
