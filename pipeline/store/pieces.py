"""Objects at a URL, read in pieces that are kept on a shelf: who reads a part of a large one fetches that part alone, and once.

A piece is kept with its checksum: one that was damaged here is fetched again. Several processes may share the shelf.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.artifacts.shelf import Shelf
from pipeline.store.index.matching import runs_of

PIECE = 2**20
# pieces of one request, and requests that are made at a time
_TOGETHER, _AT_ONCE = 16, 8
_CHECKSUM = 4


class NotFetched(FileNotFoundError):
    """An object, or a part of it, that cannot be had; the message says why."""


class Pieces(io.RawIOBase):
    """One object of `size` bytes, whose pieces are called after `name`; `fetch` returns the bytes of ranges of it (from, to).

    Raises what `fetch` raises, which is kept as `failure` too: a Parquet reader may make something else of it.
    """

    def __init__(
        self, shelf: Shelf, name: str, size: int, fetch: Callable[[Sequence[tuple[int, int]]], list[bytes]]
    ) -> None:
        super().__init__()
        self._shelf, self._name, self.size, self._fetch = shelf, name, size, fetch
        self._position = 0
        self._last = -1, b""
        self.failure: NotFetched | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where `readinto` goes on."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go elsewhere."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """See `io.RawIOBase.readinto`."""
        content = self.read_at(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def read_at(self, offset: int, length: int) -> bytes:
        """These bytes, or those of them that the object has."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        self.expect([(offset, end)])
        numbers = range(offset // PIECE, -(-end // PIECE))
        begin = numbers[0] * PIECE
        return b"".join(map(self._piece, numbers))[offset - begin : end - begin]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch what is not on the shelf of these bytes (from, to), in few requests."""
        wanted = {number for begin, end in ranges for number in range(begin // PIECE, -(-end // PIECE))}
        absent = sorted(number for number in wanted if number != self._last[0] and not self._is_there(number))
        runs = runs_of(np.array(absent, dtype=np.int64), _TOGETHER)
        for start in range(0, len(runs), _AT_ONCE):
            self._fetch_runs(runs[start : start + _AT_ONCE])

    def keep(self, contents: Iterable[bytes]) -> None:
        """Keep the object's pieces, all of them in order."""
        for number, content in enumerate(contents):
            self._keep(number, content)

    def _piece(self, number: int) -> bytes:
        if self._last[0] != number:
            with self._shelf.using(self._named(number)) as path:
                content = path.read_bytes() if path else b""
            piece, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
            if len(piece) != self._length(number) or zlib.crc32(piece).to_bytes(_CHECKSUM) != checksum:
                # damaged, or removed since it was fetched as the shelf is small
                (piece,) = self._fetch_runs([(number, number + 1)])
            self._last = number, piece
        return self._last[1]

    def _fetch_runs(self, runs: Sequence[tuple[int, int]]) -> list[bytes]:
        try:
            contents = self._fetch([(first * PIECE, min(end * PIECE, self.size)) for first, end in runs])
        except NotFetched as failure:
            self.failure = failure
            raise
        for (first, end), content in zip(runs, contents, strict=True):
            for number in range(first, end):
                self._keep(number, content[(number - first) * PIECE : (number - first + 1) * PIECE])
        return contents

    def _keep(self, number: int, piece: bytes) -> None:
        content = piece + zlib.crc32(piece).to_bytes(_CHECKSUM)

        def write(path: Path) -> None:
            path.write_bytes(content)

        self._shelf.put(self._named(number), write)

    def _is_there(self, number: int) -> bool:
        with self._shelf.using(self._named(number)) as path:
            return path is not None

    def _named(self, number: int) -> str:
        return f"{self._name}.{number}"

    def _length(self, number: int) -> int:
        return min(PIECE, self.size - number * PIECE)
