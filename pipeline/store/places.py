"""Where shards lie, one reference on one place: what is asked of a local directory (`pipeline.store.local_places`) and of what
fsspec reaches (`pipeline.store.remote_places`).

A place lists and hands out immutable files and takes new ones. A sound file is never replaced; a damaged one that holds a
name which is published again is. Shards carry the sha256 of their bytes in their name.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import RefscoreError
from pipeline.store.index.indexes import Indexes
from pipeline.store.index.merging import Files
from pipeline.store.shard import OpenShard

# what records that scores of the reference with this id may stand for those of the reference whose place it is
ADOPTION = re.compile(r"adopted-([0-9a-f]{64})\.json")


def is_url(place: str) -> bool:
    """Whether a store's place is a URL and no local path."""
    return "://" in place


@dataclass(frozen=True)
class Entry:
    """A file at a place: its name below the place, its bytes, and when it changed (seconds since 1970)."""

    name: str
    bytes: int
    changed: float


@dataclass(frozen=True)
class Listing:
    """What a place had at one moment: names of shards, of index files, and of records of adoptions, ascending."""

    shards: list[str]
    indexes: list[str]
    adoptions: list[str]
    moment: float

    def young(self, seconds: float) -> bool:
        """Whether it was made within so many seconds."""
        return time.monotonic() - self.moment < seconds


class NotThere(Exception):
    """A shard, called `name`, that was listed and is gone, or not to be had."""

    def __init__(self, name: str, problem: str = "it is gone when it is opened") -> None:
        super().__init__(problem)
        self.name = name


class Place(Files, Protocol):
    """One reference's part of one place."""

    indexes: Indexes

    def listed(self, within: float = 0) -> Listing:
        """What is there now, or was at most `within` seconds ago, but for shards that were found unsound; no file is opened.

        Raises RefscoreError if the place is not there or cannot be read.
        """
        ...

    def sound(self, shards: Sequence[str]) -> list[str]:
        """Those of the shards whose bytes are not known to be other than those that were published; damaged ones are set aside.

        Raises NotThere, and RefscoreError if one may not be read.
        """
        ...

    def opened(self, shard: str) -> AbstractContextManager[OpenShard]:
        """A shard; see `pipeline.store.shard.open_shard`. Raises NotThere."""
        ...

    def whole(self, shard: str) -> AbstractContextManager[Path]:
        """A local file with a shard's bytes, which are those that were published. Raises NotThere; Unsound if they are not."""
        ...

    def examine(self, shard: str, problem: str) -> bool:
        """Look at a shard anew, every byte, as `problem` was seen in it; whether it is sound.

        An unsound one is set aside and not listed again.
        """
        ...

    def publish(self, file: Path, name: str) -> None:
        """Make a finished local file visible as `name`, durably. What stands under that name already is kept if it has
        the same bytes, and replaced if it has not.
        """
        ...

    def why_not_writable(self) -> str | None:
        """Why nothing can be published here; None if it can. Leaves nothing behind that it may remove."""
        ...

    def workspace(self) -> Path:
        """A local directory in which to write what will be published."""
        ...

    def read(self, name: str) -> bytes:
        """What stands under a name. Raises FileNotFoundError if nothing does, RefscoreError if it may not be read."""
        ...

    def open(self, name: str) -> BinaryIO:
        """What stands under a name, to be read in any order. Raises FileNotFoundError if nothing does, RefscoreError if it may not
        be read.
        """
        ...

    def local(self, name: str, folder: Path) -> Path:
        """A local file with the bytes that stand under a name: the file itself, or a copy in `folder`. Raises like `open`."""
        ...

    def entries(self) -> list[Entry]:
        """Everything that lies here, at any depth, by name. Raises RefscoreError if it cannot be listed."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Put a small file under a name, whatever stands there. Raises RefscoreError if it may not be written."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Like `write`, of a name under which nothing may stand yet; whether nothing did."""
        ...

    def set_aside(self, name: str) -> str | None:
        """Look at a shard anew, every byte of it, and move a damaged one to `corrupt/`, where no reader looks.

        Returns what is wrong with it, None if it is sound. Raises FileNotFoundError if it is gone, RefscoreError if it may not be
        read.
        """
        ...


class Patience:
    """Bounded retries, counted per name: waits a little longer each time, then raises RefscoreError."""

    _TRIES = 6

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()

    def again(self, name: str, problem: str) -> None:
        """Wait before the next try, as `name` failed by `problem`. Raises RefscoreError after the last one."""
        self._failures[name] += 1
        if self._failures[name] >= self._TRIES:
            raise RefscoreError(
                f"{name} is listed but cannot be read, {self._TRIES} times in a row ({problem}): check the file or object, "
                "the network and your rights; once it is removed its rows are scored again"
            )
        time.sleep(0.01 * 2 ** self._failures[name])
