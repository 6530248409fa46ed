"""Where many keys stand in a store's shards, and their rows; a question reads every row group at most once.

Keys are looked for in the indexes of each place (`pipeline.store.index`), and in the shards that these do not cover; by sorting
and binary search (`matching`). A place is asked for what the places before it lack.

No row is handed out because it was found at some place: every row's own key is compared with the key asked, and its values
are checked. A shard that fails in any way is examined anew (`Place.examine`); if it is damaged it is gone from the next
listing, and what it held is looked for elsewhere, or is missing. An index that says of a shard what the shard does not is used no
more, and the question asked again.

A key that stands more than once at a place has the row that was published first, by the publisher's clock and then by the shard's
name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.artifacts.schemas import SCORES
from pipeline.errors import RefscoreError, first_line
from pipeline.store.index.index_file import IndexFile, WrongIndex
from pipeline.store.index.matching import equal_pairs
from pipeline.store.places import NotThere, Patience, Place
from pipeline.store.shard import OpenShard, ShardFacts, Unsound, facts_of, key_words, shard_problem, words_of

# readings of one shard that fail although it is sound when it is read whole: what lies between is to blame, and is named
_DOUBTS = 3


@dataclass(frozen=True)
class _Shard:
    """A shard in which keys of a question stand, and the index that says so; None if its own keys were read."""

    place: Place
    facts: ShardFacts
    index: IndexFile | None


class Lookup:
    """`keys` in the shards of `places`, each as it was listed at most `listed_within` seconds ago. Raises RefscoreError, here and
    later, if a place or a shard may not be read.
    """

    def __init__(self, places: Sequence[Place], keys: pa.FixedSizeBinaryArray, *, listed_within: float = 0) -> None:
        self._places = places
        self._words = words_of(keys)
        self._firsts, self._number = _distinct(self._words)
        self._doubts: Counter[str] = Counter()
        self._patience = Patience()
        self._locate(listed_within)

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
        return self._held_by([shard.facts.sums_only for shard in self._shards])

    def held_from_adopted(self) -> dict[str, np.ndarray]:
        """Like `held`, of the keys whose row an adopted reference computed, by the id of that reference."""
        of_shards = [shard.facts.computed_by for shard in self._shards]
        held = {by: self._held_by([by == other for other in of_shards]) for by in dict.fromkeys(of_shards) if by}
        return {by: positions for by, positions in held.items() if len(positions)}

    def found(self) -> pl.DataFrame:
        """Scores of all keys that are held: SCORES' columns, one row a key, in no order."""
        return pl.DataFrame(pa.concat_tables([SCORES.empty_table(), *(table for _, table in self.rows(self.held))]))

    def held_by(self, shards: Iterable[Path]) -> np.ndarray:
        """Like `held`, of the keys whose row stands in one of `shards`, which are told by their names."""
        names = {shard.name for shard in shards}
        return self._held_by([shard.facts.name in names for shard in self._shards])

    def rows(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Those of `positions` whose keys are held, in parts, each with a SCORES row for each of its positions.

        Keys may turn out to be held no longer while their rows are read: then they are left out, and are `missing` from then on.
        """
        left = np.ones(len(positions), dtype=bool)
        while True:
            try:
                for indices, table in self._rows(positions, np.flatnonzero(left)):
                    yield positions[indices], table
                    left[indices] = False
                return
            except _Again:
                self._locate()

    def _rows(self, positions: np.ndarray, indices: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        numbers = self._number[positions[indices]]
        shards, rows = self._shard[numbers], self._row[numbers]
        order = np.lexsort((rows, shards))
        for number in np.unique(shards[shards >= 0]):
            ours = order[slice(*np.searchsorted(shards, [number, number + 1], sorter=order))]
            shard = self._shards[number]
            name = shard.facts.name
            with self._settled(shard.place, name, shard.index), shard.place.opened(name) as file:
                if facts_of(name, file) != shard.facts:
                    raise _Misled("a shard is not what was said of it")
                for these, table in _read(file, rows, ours):
                    if not np.array_equal(key_words(table), self._words[positions[indices[these]]]):
                        raise _Misled("a row has another key than its place says")
                    if problem := shard_problem(file, table):
                        raise Unsound(problem)
                    yield indices[these], table

    def _held_by(self, chosen: Sequence[bool]) -> np.ndarray:
        positions: np.ndarray = np.sort(self._firsts[np.isin(self._shard, np.flatnonzero(chosen))])
        return positions

    def _locate(self, listed_within: float = 0) -> None:
        while True:
            self._shards: list[_Shard] = []
            self._shard = np.full(len(self._firsts), -1, dtype=np.int32)
            self._row = np.zeros(len(self._firsts), dtype=np.int64)
            try:
                for place in self._places:
                    self._ask(place, np.flatnonzero(self._shard < 0), listed_within)
                return
            except _Again:
                # what changed is to be seen
                listed_within = 0

    def _ask(self, place: Place, wanted: np.ndarray, listed_within: float) -> None:
        """Note where those of the keys stand that are `wanted` and that `place` holds."""
        if not len(wanted):
            return
        words, found = self._words[self._firsts[wanted]], _Candidates()
        listing = place.listed(listed_within)
        with self._settled(place):
            covering, uncovered = place.indexes.covering(listing.indexes, listing.shards)
        for one in [one for one in covering if one.ours.any()]:
            with self._settled(place, index=one.file):
                positions, numbers, rows = one.file.find(words)
            ours = one.ours[numbers]
            shards, numbers = np.unique(numbers[ours], return_inverse=True)
            found.add(
                [_Shard(place, one.file.shards[n], one.file) for n in shards], positions[ours], numbers, rows[ours]
            )
        if uncovered:
            with self._settled(place):
                uncovered = place.sound(uncovered)
            with place.indexes.building(covering) as building:
                for name in uncovered:
                    with self._settled(place, name):
                        facts, keys = _keys_of(place, name)
                    rows, positions = equal_pairs(keys, words)
                    found.add([_Shard(place, facts, None)], positions, np.zeros(len(rows), np.int64), rows)
                    building.add(facts, keys)
        positions, shards, rows = found.first_published()
        used, numbers = np.unique(shards, return_inverse=True)
        vouched = [found.shards[n].facts.name for n in used if found.shards[n].index is not None]
        with self._settled(place):
            if len(place.sound(vouched)) < len(vouched):
                raise _Again
        self._shard[wanted[positions]], self._row[wanted[positions]] = len(self._shards) + numbers, rows
        self._shards += [found.shards[n] for n in used]

    @contextmanager
    def _settled(self, place: Place, shard: str = "", index: IndexFile | None = None) -> Iterator[None]:
        """Raises _Again for what cannot be relied on, after doing what there is to do about it."""
        try:
            yield
            return
        except NotThere as gone:
            # a compaction removed shards, whose rows it had published anew
            self._patience.again(f"{place.name}/{gone.name}", str(gone))
        except FileNotFoundError as gone:
            if index is None:
                self._patience.again(f"the index at {place.name}", first_line(gone))
            elif place.indexes.is_worth_a_try(index.name):
                self._patience.again(f"{place.name}/{index.name}", first_line(gone))
            else:
                place.indexes.leave_out(index)
        except (WrongIndex, _Misled, Unsound) as problem:
            if index is None or type(problem) is Unsound:
                self._examine(place, shard, str(problem))
            else:
                place.indexes.refuse(index, str(problem), lies=isinstance(problem, _Misled))
        raise _Again

    def _examine(self, place: Place, shard: str, problem: str) -> None:
        self._doubts[shard] += 1
        sound = place.examine(shard, problem)
        if self._doubts[shard] >= (_DOUBTS if sound else 2 * _DOUBTS):
            raise RefscoreError(
                f"{place.name}/{shard} reads differently each time ({problem}): check this machine's memory, and the disk or the "
                "network that the store lies on"
            )


class _Again(Exception):
    """What was read cannot be relied on: the places are to be asked again."""


class _Misled(Unsound):
    """A shard has not what it should have at some place: if an index said so, that is wrong, else the shard."""


class _Candidates:
    """Where keys stand at one place, a key maybe more than once."""

    def __init__(self) -> None:
        self.shards: list[_Shard] = []
        self._found = [np.empty((3, 0), dtype=np.int64)]

    def add(self, shards: Sequence[_Shard], positions: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Keys at `positions` of the question stand in `rows` of `shards`, by their `numbers`."""
        self._found.append(np.stack([positions, numbers + len(self.shards), rows]))
        self.shards += shards

    def first_published(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each position once, with the number of its shard and its row: the first row of the shard that was published first."""
        positions, numbers, rows = np.concatenate(self._found, axis=1)
        by_age = sorted(
            range(len(self.shards)), key=lambda n: (self.shards[n].facts.published, self.shards[n].facts.name)
        )
        age = np.empty(len(by_age), dtype=np.int64)
        age[by_age] = np.arange(len(by_age))
        order = np.lexsort((rows, age[numbers], positions))
        firsts = order[np.diff(positions[order], prepend=-1) > 0]
        return positions[firsts], numbers[firsts], rows[firsts]


def _keys_of(place: Place, shard: str) -> tuple[ShardFacts, np.ndarray]:
    with place.opened(shard) as file:
        facts, words = facts_of(shard, file), key_words(file.read(columns=["key"]))
    if len(words) != facts.rows:
        raise Unsound(f"{len(words)} keys in {facts.rows} rows")
    return facts, words


def _read(file: OpenShard, rows: np.ndarray, ours: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The rows numbered `rows[ours]` (ascending) of a shard, row group by row group, each part with its share of `ours`."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = np.searchsorted(ends, rows[ours], side="right")
    for group in np.unique(groups):
        these = ours[groups == group]
        within = rows[these] - (ends[group] - sizes[group])
        yield these, file.read_row_group(group).take(pa.array(within))


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
