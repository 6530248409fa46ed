"""Who publishes shards adds them to the index, so that nobody need read them to make it: their keys are at hand.

What is published waits until it is worth a file, or until its publisher ends. Of files alike in size _ALIKE become one with what
comes, told by the place's listing alone: so a file is read once for each size that it grows through, and there are few of each
size. Larger ones than _LARGEST are left to those who look keys up (`indexes`): whoever publishes is not to wait for long.

An index saves time, and nothing rests on it: whatever fails here is logged, and shards that no index speaks of are read by
whoever asks. A publisher that is killed leaves those that wait. Publishers at once may merge the same files, and what stands in
two is looked for in one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
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
    FOLDER,
    WORTH_ROWS,
    WORTH_SHARDS,
    Files,
    alone,
    covering_all,
    merged_file,
    reading,
    removed,
)
from pipeline.store.shard import ShardFacts, facts_of, key_words, open_shard

log = logging.getLogger(__name__)

# so many shards are worth a file when a publisher ends
_FEW = 4
# files of about one size that become one
_ALIKE = 8
# bytes; about 3 million sequences
_LARGEST = 2**27


class Additions:
    """What was published at a place by this process and stands in no index file yet. Threads may share it; nothing here raises
    what a place or a disk refuses.
    """

    def __init__(self, place: Files) -> None:
        self._place = place
        self._waiting: dict[str, tuple[ShardFacts, np.ndarray]] = {}
        self._changing = threading.Lock()

    def add(self, shard: Path, name: str) -> bool:
        """A shard was published as `name`; `shard` is a local file of its bytes. Whether what waits is worth a file."""
        try:
            with open_shard(shard) as file:
                facts, words = facts_of(name, file), key_words(file.read(columns=["key"]))
        except Exception as problem:  # noqa: BLE001  # the shard is published, whatever this is
            log.info("%s is not added to an index (%s)", name, first_line(problem))
            return False
        with self._changing:
            self._waiting[name] = facts, words.copy()
            return len(self._waiting) >= WORTH_SHARDS or self._rows() >= WORTH_ROWS

    def _rows(self) -> int:
        return sum(shard.rows for shard, _ in self._waiting.values())

    def forget(self, shards: Collection[str]) -> None:
        """Somebody else made an index of these."""
        with self._changing:
            for name in self._waiting.keys() & set(shards):
                del self._waiting[name]

    def write(self, opened: Callable[[str], IndexFile | None]) -> None:
        """Make an index file of all that waits, unless that is hardly anything, and of files there that are alike; `opened` opens
        one of these, or says None if it is wrong.
        """
        with self._changing:
            if len(self._waiting) < _FEW and self._rows() < WORTH_ROWS:
                return
            waiting, self._waiting = list(self._waiting.values()), {}
        working: list[Path] = []
        try:
            self._write(waiting, opened, working)
        except Exception as problem:  # noqa: BLE001  # likewise
            shards, place = len(waiting), self._place.name
            log.info(
                "no index of %d shards is made at %s (%s): who asks reads them", shards, place, first_line(problem)
            )
        finally:
            for path in working:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _write(
        self,
        waiting: list[tuple[ShardFacts, np.ndarray]],
        opened: Callable[[str], IndexFile | None],
        working: list[Path],
    ) -> None:
        def new() -> Path:
            working.append(durable.temporary_beside(self._place.workspace() / "keys.index"))
            return working[-1]

        path, shards = new(), [shard for shard, _ in waiting]
        name = index_name(shard.name for shard in shards)
        entries = np.concatenate([entries_of(words, number) for number, (_, words) in enumerate(waiting)])
        write_index(path, shards, [by_key(entries)] if len(entries) else [])
        del entries
        with alone(self._place) as nobody_else:
            before: list[IndexFile] = []
            try:
                there = self._place.index_files() if nobody_else else {}
                files = [file for other in _alike(there, path.stat().st_size) if (file := opened(other))]
                if files:
                    sources = covering_all([IndexFile(name, LocalBytes(path)), *files])
                    path, name = merged_file(sources, new, reading(self._place))
                    before = files
            except (OSError, RefscoreError, WrongIndex) as problem:
                # another publisher was here, a file is damaged, or the disk full: what comes is a file of its own
                log.debug("index files at %s are not merged (%s)", self._place.name, first_line(problem))
            self._place.put(path, f"{FOLDER}/{name}")
            durable.reached("index: added")
            for old in before:
                if old.name != name:
                    removed(self._place, old.name)


def _alike(there: dict[str, int], size: int) -> list[str]:
    """Those of the files there, by their sizes, that are to become one with a file of so many bytes."""
    chosen: set[str] = set()
    grown = size
    while True:
        of_class = {
            name for name, bytes_ in there.items() if bytes_ <= _LARGEST and _size_class(bytes_) <= _size_class(grown)
        }
        if len(of_class - chosen) < _ALIKE - 1:
            return sorted(chosen)
        chosen |= of_class
        grown = size + sum(there[name] for name in chosen)


def _size_class(size: int) -> int:
    """Sizes of one class differ by less than _ALIKE times."""
    return (size.bit_length() - 1) // (_ALIKE.bit_length() - 1)
