"""One index file: where every key of some shards stands. It is named by the list of its shards, and says nothing of any other.

Entries are rows of five 64-bit numbers: the key's four words, and the shard's number (the upper half) with the row in it. They
ascend by the first word, and lie in pages, each with a filter by which most keys that are not there are known without it. Whole
keys stand here, so that a question is answered without opening a shard. What is read is checked: damage raises WrongIndex, and an
index that is left out costs time alone. In the file, after one another:

    entries    40 bytes each, page after page; no first word stands in two pages
    filters    FILTER words for each page
    directory  of each page its first word, where its entries begin (and where the last ends) and their crc32; of each GROUP
               of pages the crc32 of their filters; then the shards, as JSON
    trailer    _TRAILER: pages, bytes of JSON, crc32 of the directory, and the format
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.errors import first_line
from pipeline.store.index.matching import equal_pairs, runs_of
from pipeline.store.shard import SHARD, ShardFacts

# of this format: files of another one have other names
INDEX = re.compile(r"keys1-[0-9a-f]{64}\.index")
PAGE, FILTER, GROUP = 512, 64, 128

_WORD = np.dtype("<u8")
_ENTRY = 5 * _WORD.itemsize
_TRAILER = struct.Struct("<QQI20s")
_FORMAT = b"refscore index 1".ljust(20)
# pages, and groups of filters, that are read at once
_PAGES_AT_ONCE, _GROUPS_AT_ONCE = 512, 64


class WrongIndex(Exception):
    """An index file that cannot be read, is damaged, or says what is not true; the message says what was seen."""


class Bytes(Protocol):
    """A file that is read in any order."""

    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        """These bytes, or those of them that the file has. Raises OSError."""
        ...

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Hear which bytes (from, to) will be read next, so that they can be fetched together. Raises OSError."""
        ...


class LocalBytes:
    """A file of this machine. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_at(self, offset: int, length: int) -> bytes:
        """See `Bytes.read_at`."""
        # not mapped: pages of a mapped file would count as this process's memory
        content = os.pread(self._descriptor, length, offset)
        while 0 < len(content) < length and (
            more := os.pread(self._descriptor, length - len(content), offset + len(content))
        ):
            content += more
        return content

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `Bytes.expect`: the system begins to read."""
        for begin, end in ranges:
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


def index_name(shards: Iterable[str]) -> str:
    """The name of the index of the shards so named."""
    return f"keys1-{hashlib.sha256(' '.join(sorted(shards)).encode()).hexdigest()}.index"


def entries_of(words: np.ndarray, shard: int) -> np.ndarray:
    """The entries of a shard's keys, in the order of its rows; `shard` is its number in the index."""
    entries = np.empty((len(words), 5), dtype=_WORD)
    entries[:, :4] = words
    entries[:, 4] = np.arange(len(words), dtype=_WORD) | np.uint64(shard << 32)
    return entries


def by_key(entries: np.ndarray) -> np.ndarray:
    """Entries in the order of an index file."""
    ordered: np.ndarray = entries[np.argsort(entries[:, 0], kind="stable")]
    return ordered


def write_index(path: Path, shards: Sequence[ShardFacts], parts: Iterable[np.ndarray]) -> None:
    """Write the entries of `shards`, which come in parts: within a part and from part to part their first words ascend, and none
    stands in two parts. Raises OSError.
    """
    fences, starts, checksums, of_filters = [np.empty(0, _WORD)], [np.zeros(1, _WORD)], list[int](), list[int]()
    with path.open("wb") as file, tempfile.TemporaryFile(dir=path.parent) as filters:
        for entries in parts:
            begins = _page_begins(entries[:, 0])
            fences.append(entries[begins, 0])
            starts.append(starts[-1][-1] + np.append(begins[1:], len(entries)).astype(_WORD))
            content = memoryview(entries.tobytes())
            for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(entries)], strict=True):
                checksums.append(zlib.crc32(content[begin * _ENTRY : end * _ENTRY]))
            file.write(content)
            filters.write(_filters(entries, begins).tobytes())
        filters.seek(0)
        while block := filters.read(GROUP * FILTER * _WORD.itemsize):
            of_filters.append(zlib.crc32(block))
            file.write(block)
        said = json.dumps([dataclasses.asdict(shard) for shard in shards]).encode()
        directory = b"".join(
            [np.concatenate(fences).tobytes(), np.concatenate(starts).tobytes()]
            + [np.array(sums, "<u4").tobytes() for sums in (checksums, of_filters)]
            + [said]
        )
        file.write(directory)
        file.write(_TRAILER.pack(len(checksums), len(said), zlib.crc32(directory), _FORMAT))


class IndexFile:
    """An index file that was opened: its directory was read and checked. Raises WrongIndex, here and later; FileNotFoundError if it
    is gone.
    """

    def __init__(self, name: str, file: Bytes) -> None:
        self.name, self._file = name, file
        trailer = self._read(file.size - _TRAILER.size, _TRAILER.size)
        pages, said, self.checksum, form = _TRAILER.unpack(trailer)
        if form != _FORMAT:
            raise WrongIndex("it has another format")
        groups = -(-pages // GROUP)
        length = 8 * pages + 8 * (pages + 1) + 4 * pages + 4 * groups + said
        directory = self._read(file.size - _TRAILER.size - length, length)
        if zlib.crc32(directory) != self.checksum:
            raise WrongIndex("its directory is damaged")
        self._fences = np.frombuffer(directory, _WORD, pages)
        self._starts = np.frombuffer(directory, _WORD, pages + 1, 8 * pages).astype(np.int64) * _ENTRY
        self._checksums = np.frombuffer(directory, "<u4", pages, 16 * pages + 8)
        self._of_filters = np.frombuffer(directory, "<u4", groups, 20 * pages + 8)
        self._filters = int(self._starts[-1])
        self.shards = _shards(directory[length - said :])
        self._rows = np.array([shard.rows for shard in self.shards], dtype=np.int64)
        size = self._filters + pages * FILTER * _WORD.itemsize + length + _TRAILER.size
        ascending = (np.diff(self._starts) > 0).all() and (self._fences[1:] > self._fences[:-1]).all()
        if (
            self._starts[0] != 0
            or not ascending
            or size != file.size
            or name != index_name(s.name for s in self.shards)
        ):
            raise WrongIndex("its directory does not describe it")

    @property
    def size(self) -> int:
        """Its entries."""
        return self._filters // _ENTRY

    @property
    def fences(self) -> np.ndarray:
        """The first word of every page, ascending."""
        return self._fences

    def find(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where keys stand whose `words` ascend by the first: positions in `words`, each with a shard's number and a row of it.

        A key that stands more than once is there as often.
        """
        pages = np.searchsorted(self._fences, words[:, 0], side="right") - 1
        asked = np.flatnonzero(pages >= 0)
        asked = asked[self._may_hold(words[asked], pages[asked])]
        pages = pages[asked]
        runs = runs_of(np.unique(pages), _PAGES_AT_ONCE)
        self._expect([(int(self._starts[first]), int(self._starts[end])) for first, end in runs])
        found = [np.empty((3, 0), dtype=np.int64)]
        for first, end in runs:
            ours, entries = asked[slice(*np.searchsorted(pages, [first, end]))], self._entries(first, end)
            mine, there = equal_pairs(words[ours], entries)
            stands = entries[there, 4]
            found.append(
                np.stack([ours[mine], (stands >> np.uint64(32)), stands & np.uint64(0xFFFFFFFF)]).astype(np.int64)
            )
        positions, shards, rows = np.concatenate(found, axis=1)
        if (shards >= len(self.shards)).any() or (rows >= self._rows[shards]).any():
            raise WrongIndex("it names a row that there is not")
        return positions, shards, rows

    def between(self, low: int, high: int) -> np.ndarray:
        """All entries with first words from `low` to `high`."""
        first = max(int(np.searchsorted(self._fences, np.uint64(low), side="right")) - 1, 0)
        end = int(np.searchsorted(self._fences, np.uint64(high), side="right"))
        entries = self._entries(first, max(first, end))
        if (entries[:, 4] >> np.uint64(32) >= len(self.shards)).any():
            raise WrongIndex("it names a shard that it does not know")
        return entries[(entries[:, 0] >= np.uint64(low)) & (entries[:, 0] <= np.uint64(high))]

    def _may_hold(self, words: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """Which of the keys their pages' filters let pass; `pages` ascend."""
        groups, passed = pages // GROUP, np.zeros(len(words), dtype=bool)
        size = FILTER * _WORD.itemsize
        runs = runs_of(np.unique(groups), _GROUPS_AT_ONCE)
        last = len(self._fences)
        begins = self._filters + size * np.minimum(np.arange(len(self._of_filters) + 1) * GROUP, last)
        self._expect([(int(begins[first]), int(begins[end])) for first, end in runs])
        slots, masks = _in_filter(words)
        for first, end in runs:
            ours = slice(*np.searchsorted(groups, [first, end]))
            filters = self._checked(begins[first : end + 1], self._of_filters[first:end]).reshape(-1, FILTER)
            passed[ours] = filters[pages[ours] - first * GROUP, slots[ours]] & masks[ours] == masks[ours]
        return passed

    def _entries(self, first: int, end: int) -> np.ndarray:
        return self._checked(self._starts[first : end + 1], self._checksums[first:end]).reshape(-1, 5)

    def _checked(self, begins: np.ndarray, checksums: np.ndarray) -> np.ndarray:
        """The words between the first and the last of `begins`, each stretch compared with its checksum."""
        content = self._read(int(begins[0]), int(begins[-1] - begins[0]))
        view, places = memoryview(content), (begins - begins[0]).tolist()
        for begin, end, checksum in zip(places[:-1], places[1:], checksums.tolist(), strict=True):
            if zlib.crc32(view[begin:end]) != checksum:
                raise WrongIndex("it is damaged")
        return np.frombuffer(content, _WORD)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            content = self._file.read_at(offset, length) if offset >= 0 else b""
        except FileNotFoundError:
            raise
        except OSError as error:
            raise WrongIndex(f"it cannot be read ({first_line(error)})") from None
        if len(content) != length:
            raise WrongIndex("it is too short")
        return content

    def _expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        try:
            self._file.expect(ranges)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise WrongIndex(f"it cannot be read ({first_line(error)})") from None


def _shards(said: bytes) -> list[ShardFacts]:
    kinds = {field.name: field.type for field in dataclasses.fields(ShardFacts)}
    try:
        shards = [ShardFacts(**shard) for shard in json.loads(said)]
    except (ValueError, TypeError, RecursionError):
        raise WrongIndex("it does not say of which shards it is") from None
    if not all(
        type(getattr(shard, name)).__name__ == kind for shard in shards for name, kind in kinds.items()
    ) or not all(SHARD.fullmatch(shard.name) and 0 <= shard.rows < 2**32 for shard in shards):
        raise WrongIndex("it does not say of which shards it is")
    return shards


def _page_begins(heads: np.ndarray) -> np.ndarray:
    """Where pages of about PAGE entries begin, each with a first word that the entry before has not."""
    new = np.flatnonzero(np.append(True, heads[1:] != heads[:-1])) if len(heads) else np.empty(0, np.int64)
    wanted = np.searchsorted(new, np.arange(0, len(heads), PAGE))
    return np.unique(new[wanted[wanted < len(new)]])


def _filters(entries: np.ndarray, begins: np.ndarray) -> np.ndarray:
    pages = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(entries))))
    slots, masks = _in_filter(entries)
    filters = np.zeros(len(begins) * FILTER, dtype=_WORD)
    np.bitwise_or.at(filters, pages * FILTER + slots.astype(np.int64), masks)
    return filters


def _in_filter(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which word of its page's filter is a key's, and the four bits that it sets there; told by its second word."""
    second = words[:, 1]
    bits = [np.uint64(1) << (second >> np.uint64(6 * place) & np.uint64(63)) for place in range(4)]
    return second >> np.uint64(58), bits[0] | bits[1] | bits[2] | bits[3]
