"""Scores of one reference that may stand for another's: an engine was updated, and the numbers hardly changed.

That it may was found out on a sample, and is recorded at the reference that adopts, in `adopted-<id of the adopted one>.json`: a
file of its own, so that who adopts another at the same moment takes nothing from it. What the adopted reference computed is then
published under the adopting one's keys, in shards that say who computed them. An adoption speaks for what the adopted reference
computed itself, not for what it took over from a third one: only the former was compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import SCORES
from pipeline.errors import DataError, first_line
from pipeline.store.identity import IMPORTED, ReferenceIdentity, keys_of
from pipeline.store.lookup import Lookup
from pipeline.store.places import ADOPTION, NotThere, Place
from pipeline.store.shard import Unsound, computed_by
from pipeline.store.store import Store

log = logging.getLogger(__name__)

# bytes of rows that are published together
_SHARD_BYTES = 2**26
# seconds: the earlier engine scores no more, so its shards need not be listed for each window
_LISTED_WITHIN = 60


@dataclass(frozen=True)
class Adoption:
    """That scores of `adopted` may stand for those of `by`, and what that was found on: figures in nats, the limits they kept, and
    when (ISO 8601).
    """

    adopted: ReferenceIdentity
    by: ReferenceIdentity
    figures: dict[str, float]
    tolerance: dict[str, float]
    date: str

    @property
    def words(self) -> str:
        """From whom, when and how near, for people."""
        difference = self.figures["mean_absolute_difference"]
        return (
            f"adopted from {self.adopted.reference_id[:12]} ({self.adopted.numerics.words}) on {self.date[:10]}: mean absolute "
            f"difference {difference:.2g} nats per token"
        )

    def described(self) -> dict[str, Any]:
        """The content of its file."""
        return {**vars(self), "adopted": self.adopted.described(), "by": self.by.described()}

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> Adoption:
        """The inverse of `described`. Raises DataError for what is no record, or one that no adoption could have written."""
        try:
            identities = {name: ReferenceIdentity.from_described(content[name]) for name in ("adopted", "by")}
            adoption = cls(**{**content, **identities})
            _ = adoption.words  # figures and date are there, and of their kind
            within = all(abs(adoption.figures[name]) <= limit for name, limit in adoption.tolerance.items())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError("a record that describes no adoption") from None
        if adoption.adopted.model != adoption.by.model:
            raise DataError("a record of two models that are not the same")
        adopted, by = adoption.adopted.numerics, adoption.by.numerics
        if not within or adopted.engine == IMPORTED or (adopted.logps and not by.logps):
            raise DataError("a record of what may not be adopted")
        return adoption


def recorded(place: Place, reference_id: str, *, listed_within: float = 0) -> dict[str, Adoption]:
    """What a place, as it was listed at most `listed_within` seconds ago, records for the reference `reference_id`, by the id of
    the adopted one.

    A record that describes other references, or none, is not believed; that is said in a warning.
    """
    found = {}
    for name in place.listed(listed_within).adoptions:
        try:
            adoption = Adoption.from_described(json.loads(place.read(name)))
        except FileNotFoundError:
            continue  # it was taken back meanwhile
        except (DataError, ValueError) as error:
            log.warning("%s/%s is not believed: %s", place.name, name, first_line(error))
            continue
        adopted = adoption.adopted.reference_id
        if (record_of(adopted), adoption.by.reference_id) != (name, reference_id):
            log.warning("%s/%s is not believed: it is of other references", place.name, name)
            continue
        found[adopted] = adoption
    return found


def record_of(adopted: str) -> str:
    """The name of the file that records that the reference with this id was adopted."""
    return f"adopted-{adopted}.json"


def adoptions(store: Store, *, listed_within: float = 0) -> dict[str, Adoption]:
    """Whose scores may stand for those of the store's reference, as recorded at any of its places, by id: what differs least
    comes first.
    """
    found: dict[str, Adoption] = {}
    for place in store.places:
        found = recorded(place, store.reference.reference_id, listed_within=listed_within) | found
    return dict(sorted(found.items(), key=lambda item: (item[1].figures["mean_absolute_difference"], item[0])))


def adopt(store: Store, adoption: Adoption) -> None:
    """Record an adoption at the first place, in place of an earlier one of the same reference."""
    store.note(record_of(adoption.adopted.reference_id), adoption.described())


@dataclass(frozen=True)
class Revoked:
    """What was taken back: the id of the reference whose scores stand in no more, and the `rows` that were taken over from it.
    `elsewhere` are later places that record its adoption too, where nothing was changed.
    """

    adopted: str
    rows: int
    elsewhere: list[str]


def revoke(store: Store, prefix: str) -> Revoked:
    """Take back the adoption, at the first place, of the reference whose id begins with `prefix`, and what was taken over from it.

    The adopted reference keeps its scores. Raises DataError if the first place records no such adoption, or more than one.
    """
    place, *others = store.places
    # a record that is damaged can be taken back too
    found = [adopted for name in place.listed().adoptions if (adopted := ADOPTION.sub(r"\1", name)).startswith(prefix)]
    if len(found) != 1:
        raise DataError(
            f"{place.name} records {len(found)} adoptions of references whose id begins with {prefix!r}: 'refscore store ls' lists "
            "them; the place that records one is to be first in reference.store"
        )
    (adopted,) = found
    place.remove(record_of(adopted))
    rows, looked_at = 0, set[str]()
    # who merges shards at this moment publishes what they held under another name
    while unseen := set(place.listed().shards) - looked_at:
        looked_at |= unseen
        for shard in sorted(unseen):
            rows += _removed(place, shard, adopted)
    return Revoked(adopted, rows, [other.name for other in others if record_of(adopted) in other.listed().adoptions])


def _removed(place: Place, shard: str, adopted: str) -> int:
    """Remove a shard whose rows `adopted` computed; how many they were."""
    # one that is gone or damaged by now is nobody's
    with suppress(NotThere, Unsound), place.opened(shard) as file:
        if computed_by(file) == adopted:
            place.remove(shard)
            return int(file.metadata.num_rows)
    return 0


def held_by_adopted(
    store: Store, absent: np.ndarray, keys_of_absent: Callable[[str, np.ndarray], pa.FixedSizeBinaryArray]
) -> dict[str, np.ndarray]:
    """Those of the positions `absent`, ascending, whose scores adopted references hold, by the reference's id.

    `keys_of_absent(reference_id, positions)` gives the keys of some of them under another reference.
    """
    held = {}
    for adopted, adoption in adoptions(store).items():
        if not len(absent):
            break
        found = held_of_its_own(store.of(adoption.adopted).lookup(keys_of_absent(adopted, absent)))
        if len(found):
            held[adopted], absent = absent[found], np.delete(absent, found)
    return held


def serve_from_adopted(store: Store, missing: pa.Table) -> pa.Table:
    """Publish what adopted references hold of `missing`, MISSING's rows; returns the rows that are still missing.

    Raises RefscoreError if the store cannot be read or written.
    """
    if not len(missing):
        return missing
    for adopted, adoption in adoptions(store, listed_within=_LISTED_WITHIN).items():
        lookup = store.of(adoption.adopted).lookup(keys_of(adopted, missing), listed_within=_LISTED_WITHIN)
        taken = np.zeros(len(missing), dtype=bool)
        for positions, table in _together(lookup.rows(held_of_its_own(lookup))):
            keys = missing["key"].combine_chunks().take(pa.array(positions))
            store.publish_table(table.set_column(0, SCORES.field("key"), keys), computed_by=adopted)
            taken[positions] = True
        missing = missing.filter(pa.array(~taken))
    return missing


def held_of_its_own(lookup: Lookup) -> np.ndarray:
    """Like `Lookup.held`, without what was taken over from other references."""
    return np.setdiff1d(lookup.held, np.concatenate([np.empty(0, np.int64), *lookup.held_from_adopted().values()]))


def _together(parts: Iterator[tuple[np.ndarray, pa.Table]]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The parts, joined to about `_SHARD_BYTES`."""
    positions: list[np.ndarray] = []
    tables: list[pa.Table] = []
    filled = 0
    for these, table in parts:
        positions.append(these)
        tables.append(table)
        filled += table.nbytes
        if filled >= _SHARD_BYTES:
            yield np.concatenate(positions), pa.concat_tables(tables).combine_chunks()
            positions, tables, filled = [], [], 0
    if tables:
        yield np.concatenate(positions), pa.concat_tables(tables).combine_chunks()
