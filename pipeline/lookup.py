"""Where many keys stand in a store's shards, and their rows; a question reads every row group at most once.

Keys are matched by sorting and binary search: hash tables of millions of keys take several times the keys' memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, first_line
from pipeline.schema import SCORES


class Lookup:
    """`keys` in the shards that `shards()` lists. Raises DataError, here and later, where a shard cannot be read."""

    def __init__(self, shards: Callable[[], list[Path]], keys: pa.FixedSizeBinaryArray) -> None:
        self._list = shards
        self._words = _words(keys)
        self._firsts, self._number = _distinct(self._words)
        self._heads = self._words[self._firsts, 0]
        self._locate()

    @property
    def missing(self) -> np.ndarray:
        """Positions, ascending, at which those of the keys first stand that no shard holds."""
        found: np.ndarray = np.sort(self._firsts[self._shard < 0])
        return found

    @property
    def held(self) -> np.ndarray:
        """Positions, ascending, at which those of the keys first stand that a shard holds."""
        found: np.ndarray = np.sort(self._firsts[self._shard >= 0])
        return found

    def found(self) -> pl.DataFrame:
        """Scores of all keys that are held: SCORES' columns, one row a key, in no order."""
        return pl.DataFrame(pa.concat_tables([SCORES.empty_table(), *(table for _, table in self.rows(self.held))]))

    def rows(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Those of `positions` whose keys are held, in parts, each with a SCORES row for each of its positions."""
        left = np.ones(len(positions), dtype=bool)
        while True:
            try:
                for places, table in self._rows(positions, np.flatnonzero(left)):
                    yield positions[places], table
                    left[places] = False
                return
            except FileNotFoundError:
                # a compaction removed shards, whose rows it had published anew
                self._locate()

    def _rows(self, positions: np.ndarray, places: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        numbers = self._number[positions[places]]
        shards, rows = self._shard[numbers], self._row[numbers]
        order = np.lexsort((rows, shards))
        for shard in np.unique(shards[shards >= 0]):
            ours = order[slice(*np.searchsorted(shards, [shard, shard + 1], sorter=order))]
            with _open(self._shards[shard]) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                ends = np.cumsum(sizes)
                groups = np.searchsorted(ends, rows[ours], side="right")
                for group in np.unique(groups):
                    these = ours[groups == group]
                    within = rows[these] - (ends[group] - sizes[group])
                    yield places[these], file.read_row_group(group).take(pa.array(within))

    def _locate(self) -> None:
        self._shards: list[Path] = []
        self._shard = np.full(len(self._firsts), -1, dtype=np.int32)
        self._row = np.zeros(len(self._firsts), dtype=np.int32)
        while True:
            try:
                for shard in sorted(set(self._list()) - set(self._shards)):
                    with _open(shard) as file:
                        self._note(len(self._shards), _words(file.read(columns=["key"])["key"].combine_chunks()))
                    self._shards.append(shard)
                return
            except FileNotFoundError:
                continue  # likewise

    def _note(self, shard: int, held: np.ndarray) -> None:
        """Note which of the keys are among the shard's, whose words are `held`."""
        rows, at = np.arange(len(held)), np.searchsorted(self._heads, held[:, 0])
        while len(rows):
            inside = at < len(self._heads)
            rows, at = rows[inside], at[inside]
            alike = self._heads[at] == held[rows, 0]
            rows, at = rows[alike], at[alike]
            equal = (self._words[self._firsts[at]] == held[rows]).all(axis=1)
            # two writers may have scored the same row: any one of the equal-keyed rows will do
            self._shard[at[equal]], self._row[at[equal]] = shard, rows[equal]
            # keys with the same first word stand behind one another
            rows, at = rows[~equal], at[~equal] + 1


def _words(keys: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Keys as rows of four 64-bit numbers, without a copy."""
    if not len(keys):
        return np.empty((0, 4), dtype=np.uint64)
    return np.frombuffer(keys.buffers()[1], dtype=np.uint64).reshape(-1, 4)[keys.offset : keys.offset + len(keys)]


def _distinct(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first position of each distinct key, in ascending order of the keys' first words; for every key, which it is."""
    order = np.argsort(words[:, 0], kind="stable")
    new = _differ_from_the_last(words[:, :1], order)
    if not np.array_equal(new, _differ_from_the_last(words, order)):
        # different keys with the same first word: equal ones need not be neighbours yet
        order = np.lexsort(words.T[::-1])
        new = _differ_from_the_last(words, order)
    number = np.empty(len(words), dtype=np.int64)
    number[order] = np.cumsum(new) - 1
    return order[new], number


def _differ_from_the_last(words: np.ndarray, order: np.ndarray) -> np.ndarray:
    new = np.zeros(len(order), dtype=bool)
    new[:1] = True
    for column in words.T:
        in_order = column[order]
        new[1:] |= in_order[1:] != in_order[:-1]
    return new


@contextmanager
def _open(shard: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            if not file.schema_arrow.remove_metadata().equals(SCORES):
                raise DataError(f"{shard} has another schema: run 'refscore store verify'")
            yield file
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{shard} cannot be read ({first_line(error)}): run 'refscore store verify'") from None
