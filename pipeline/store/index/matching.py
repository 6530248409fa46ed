"""Equal keys in two lists, by sorting and binary search: hash tables of millions of keys take several times their memory."""

from __future__ import annotations

import numpy as np


def equal_pairs(these: np.ndarray, those: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every i and j with equal keys `these[i]` and `those[j]`, all four words compared; `those` ascend by their first words."""
    heads = np.ascontiguousarray(those[:, 0])
    i, j = np.arange(len(these)), np.searchsorted(heads, these[:, 0])
    found = [np.empty((2, 0), dtype=np.int64)]
    while len(i):
        inside = j < len(heads)
        i, j = i[inside], j[inside]
        alike = heads[j] == these[i, 0]
        i, j = i[alike], j[alike]
        equal = (these[i, :4] == those[j, :4]).all(axis=1)
        found.append(np.stack([i[equal], j[equal]]))
        # keys with the same first word stand behind one another
        j = j + 1
    mine, other = np.concatenate(found, axis=1)
    return mine, other


def runs_of(numbers: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Numbers that ascend, as ranges (first, end) without a gap, none longer than `most`."""
    begins = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    ends = np.append(begins[1:], len(numbers))[: len(begins)]
    return [
        (first, min(first + most, int(numbers[end - 1]) + 1))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        for first in range(int(numbers[begin]), int(numbers[end - 1]) + 1, most)
    ]
