"""Sets of digests that are larger than memory: sorted runs, asked and enlarged in batches, compared in full."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from pipeline.artifacts.durable import explaining_disk, scratch_place

# digests of a run that memory holds
_IN_MEMORY = 2**15
# digests of two runs that are merged at a time
_AT_ONCE = 2**17


class DigestSet:
    """Digests of some bytes each, a multiple of eight. Asked and given as arrays of bytes [digests, bytes].

    Runs are sorted, and each is more than twice as long as the next: so a digest is moved as often as their number, which
    grows with the logarithm of the digests. Long ones lie in files without a name, which go with the set.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def holds(self, digests: np.ndarray) -> np.ndarray:
        """Which of the digests are in the set [digests]."""
        asked = _words(digests)
        found = np.zeros(len(asked), dtype=bool)
        # in order, so that neighbours are looked for in the same pages
        order = np.argsort(asked[:, 0])
        for run in self._runs:
            found[order] |= _held(run, asked[order])
        return found

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add the digests; which of them are new [digests], of equal ones the first."""
        words = _words(digests)
        order = _order(words)
        ordered = words[order]
        first = np.ones(len(words), dtype=bool)
        first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        new = np.zeros(len(words), dtype=bool)
        new[order[first]] = True
        new &= ~self.holds(digests)
        if new.any():
            self._push(ordered[new[order]])
        return new

    def _push(self, run: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = _merged(self._runs.pop(), run)
        self._runs.append(run)


def _words(digests: np.ndarray) -> np.ndarray:
    """Each digest as numbers, of which the first decide its place."""
    return np.ascontiguousarray(digests).view(">u8").astype(np.uint64)


def _order(words: np.ndarray) -> np.ndarray:
    """Places of the digests in order; equal ones stay in theirs."""
    places: np.ndarray = np.lexsort(words.T[::-1])
    return places


def _held(run: np.ndarray, asked: np.ndarray) -> np.ndarray:
    found = np.zeros(len(asked), dtype=bool)
    prefixes = run[:, 0]
    at = np.searchsorted(prefixes, asked[:, 0])
    left = np.arange(len(asked))
    # all that begin with the same eight bytes are looked at
    while len(left):
        left = left[at[left] < len(run)]
        left = left[prefixes[at[left]] == asked[left, 0]]
        found[left] |= (run[at[left]] == asked[left]).all(axis=1)
        at[left] += 1
    return found


def _merged(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Two runs as one: part by part, each of all digests whose first bytes lie between two numbers."""
    size = len(one) + len(other)
    merged = np.empty((size, one.shape[1]), np.uint64) if size <= _IN_MEMORY else _in_file((size, one.shape[1]))
    parts = -(-size // _AT_ONCE)
    edges = np.array([2**64 * part // parts for part in range(1, parts)], np.uint64)
    bounds = [[0, *np.searchsorted(run[:, 0], edges), len(run)] for run in (one, other)]
    at = 0
    for part in range(parts):
        both = np.concatenate(
            [run[bound[part] : bound[part + 1]] for run, bound in zip((one, other), bounds, strict=True)]
        )
        merged[at : at + len(both)] = both[_order(both)]
        at += len(both)
    return merged


def _in_file(shape: tuple[int, int]) -> np.ndarray:
    place = Path(scratch_place() or tempfile.gettempdir())
    size = 8 * shape[0] * shape[1]
    with explaining_disk(place / "digests", size), tempfile.TemporaryFile(dir=place) as file:
        # what a mapped file finds no room for, once it is written, would end the process without a word
        os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint64, "r+", shape=shape)
