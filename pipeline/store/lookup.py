"""Where many keys stand in a store's shards, and their rows; a question reads every row group at most once.

Keys are matched by sorting and binary search: hash tables of millions of keys take several times the keys' memory.

No row is handed out because it was found at some place: every row's own key is compared with the key asked, and its values
are checked. A shard that fails in any way is examined anew (`Place.examine`); if it is damaged it is gone from the next
listing, and what it held is looked for elsewhere, or is missing.

A key that stands more than once has the row that was published first, by the publisher's clock and then by the shard's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.artifacts.schemas import SCORES
from pipeline.errors import RefscoreError
from pipeline.store.places import Patience, Place
from pipeline.store.shard import (
    Unsound,
    computed_by,
    key_words,
    open_shard,
    published_at,
    shard_problem,
    sums_only,
    words_of,
)

# readings of one shard that fail although it is sound when it is read whole: what lies between is to blame, and is named
_DOUBTS = 3


class Lookup:
    """`keys` in the shards of `places`. Raises RefscoreError, here and later, if a place or a shard may not be read."""

    def __init__(self, places: Sequence[Place], keys: pa.FixedSizeBinaryArray) -> None:
        self._places = places
        self._words = words_of(keys)
        self._firsts, self._number = _distinct(self._words)
        self._heads = self._words[self._firsts, 0]
        self._doubts: Counter[Path] = Counter()
        self._locate()

    @property
    def missing(self) -> np.ndarray:
        """Positions, ascending, at which those of the keys first stand that no shard holds."""
        positions: np.ndarray = np.sort(self._firsts[self._shard < 0])
        return positions

    @property
    def held(self) -> np.ndarray:
        """Positions, ascending, at which those of the keys first stand that a shard holds."""
        positions: np.ndarray = np.sort(self._firsts[self._shard >= 0])
        return positions

    @property
    def held_as_sums(self) -> np.ndarray:
        """Like `held`, of the keys whose row has a sum and no values per token."""
        return self.held_by([shard for shard, sums in zip(self._shards, self._sums_only, strict=True) if sums])

    def held_from_adopted(self) -> dict[str, np.ndarray]:
        """Like `held`, of the keys whose row an adopted reference computed, by the id of that reference."""
        shards: dict[str, list[Path]] = {}
        for shard, by in zip(self._shards, self._computed_by, strict=True):
            if by:
                shards.setdefault(by, []).append(shard)
        return {by: positions for by, theirs in shards.items() if len(positions := self.held_by(theirs))}

    def found(self) -> pl.DataFrame:
        """Scores of all keys that are held: SCORES' columns, one row a key, in no order."""
        return pl.DataFrame(pa.concat_tables([SCORES.empty_table(), *(table for _, table in self.rows(self.held))]))

    def held_by(self, shards: list[Path]) -> np.ndarray:
        """Like `held`, of the keys whose row stands in one of `shards`."""
        numbers = [number for number, shard in enumerate(self._shards) if shard in set(shards)]
        positions: np.ndarray = np.sort(self._firsts[np.isin(self._shard, numbers)])
        return positions

    def rows(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Those of `positions` whose keys are held, in parts, each with a SCORES row for each of its positions.

        Keys may turn out to be held no longer while their rows are read: then they are left out, and are `missing` from then on.
        """
        left = np.ones(len(positions), dtype=bool)
        patience = Patience()
        while True:
            try:
                for indices, table in self._rows(positions, np.flatnonzero(left)):
                    yield positions[indices], table
                    left[indices] = False
                return
            except _Gone as gone:
                # a compaction removed shards, whose rows it had published anew
                patience.again(str(gone.shard), "it is gone when it is opened")
            except _Doubtful as doubtful:
                self._examine(doubtful)
            self._locate()

    def _rows(self, positions: np.ndarray, indices: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        numbers = self._number[positions[indices]]
        shards, rows = self._shard[numbers], self._row[numbers]
        order = np.lexsort((rows, shards))
        for shard in np.unique(shards[shards >= 0]):
            ours = order[slice(*np.searchsorted(shards, [shard, shard + 1], sorter=order))]
            with _named(self._place_of[shard], self._shards[shard]):
                for these, table, problem in _read(self._shards[shard], rows, ours):
                    if not np.array_equal(key_words(table), self._words[positions[indices[these]]]):
                        raise Unsound("a row has another key than its place says")
                    if problem:
                        raise Unsound(problem)
                    yield indices[these], table

    def _locate(self) -> None:
        self._shards: list[Path] = []
        self._place_of: list[Place] = []
        self._sums_only: list[bool] = []
        self._computed_by: list[str | None] = []
        self._order: list[tuple[int, str]] = []
        self._shard = np.full(len(self._firsts), -1, dtype=np.int32)
        self._row = np.zeros(len(self._firsts), dtype=np.int32)
        patience = Patience()
        while True:
            try:
                for place in self._places:
                    for shard in sorted(set(place.shards()) - set(self._shards)):
                        with _named(place, shard):
                            self._take(place, shard)
                return
            except _Gone as gone:
                patience.again(str(gone.shard), "it is gone when it is opened")
            except _Doubtful as doubtful:
                self._examine(doubtful)

    def _take(self, place: Place, shard: Path) -> None:
        with open_shard(shard) as file:
            words = key_words(file.read(columns=["key"]))
            if len(words) != file.metadata.num_rows:
                raise Unsound(f"{len(words)} keys in {file.metadata.num_rows} rows")
            published, sums, by = published_at(file), sums_only(file), computed_by(file)
        self._shards.append(shard)
        self._sums_only.append(sums)
        self._computed_by.append(by)
        self._place_of.append(place)
        self._order.append((published, shard.name))
        self._note(len(self._shards) - 1, words)

    def _note(self, shard: int, keys: np.ndarray) -> None:
        """Note which of the keys are among the shard's, whose words are `keys`, unless they were published before."""
        later = np.array([order > self._order[shard] for order in self._order])
        # from the last row to the first, so that the first of two with one key stays
        rows = np.arange(len(keys))[::-1]
        at = np.searchsorted(self._heads, keys[rows, 0])
        while len(rows):
            inside = at < len(self._heads)
            rows, at = rows[inside], at[inside]
            alike = self._heads[at] == keys[rows, 0]
            rows, at = rows[alike], at[alike]
            equal = (self._words[self._firsts[at]] == keys[rows]).all(axis=1)
            earlier_shards = self._shard[at[equal]]
            ours = at[equal][(earlier_shards < 0) | (earlier_shards == shard) | later[earlier_shards]]
            mine = rows[equal][(earlier_shards < 0) | (earlier_shards == shard) | later[earlier_shards]]
            self._shard[ours], self._row[ours] = shard, mine
            # keys with the same first word stand behind one another
            rows, at = rows[~equal], at[~equal] + 1

    def _examine(self, doubtful: _Doubtful) -> None:
        shard = doubtful.shard
        self._doubts[shard] += 1
        sound = doubtful.place.examine(shard, doubtful.problem)
        if self._doubts[shard] >= (_DOUBTS if sound else 2 * _DOUBTS):
            raise RefscoreError(
                f"{shard} reads differently each time ({doubtful.problem}): check this machine's memory, and the disk or the "
                "network that the store lies on"
            )


class _Gone(Exception):
    """A shard that was listed and is not there."""

    def __init__(self, shard: Path) -> None:
        super().__init__(shard)
        self.shard = shard


class _Doubtful(Exception):
    """A shard of which something was read that cannot be true."""

    def __init__(self, place: Place, shard: Path, problem: str) -> None:
        super().__init__(problem)
        self.place, self.shard, self.problem = place, shard, problem


@contextmanager
def _named(place: Place, shard: Path) -> Iterator[None]:
    try:
        yield
    except Unsound as unsound:
        raise _Doubtful(place, shard, str(unsound)) from None
    except FileNotFoundError:
        raise _Gone(shard) from None


def _read(shard: Path, rows: np.ndarray, ours: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table, str | None]]:
    """The rows numbered `rows[ours]` (ascending) of a shard, row group by row group, each part with its share of `ours`, and with
    why it cannot be true.
    """
    with open_shard(shard) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, rows[ours], side="right")
        for group in np.unique(groups):
            these = ours[groups == group]
            within = rows[these] - (ends[group] - sizes[group])
            table = file.read_row_group(group).take(pa.array(within))
            yield these, table, shard_problem(file, table)


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
