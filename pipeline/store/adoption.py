"""Scores of one reference that may stand for another's: an engine was updated, and the numbers hardly changed.

That it may was found out on a sample, and is recorded at the reference that adopts, in adopted.json. What the adopted reference
computed is then published under the adopting one's keys, in shards that say who computed them. An adoption speaks for what the
adopted reference computed itself, not for what it took over from a third one: only the former was compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import SCORES
from pipeline.errors import DataError, first_line
from pipeline.store.identity import ReferenceIdentity, keys_of
from pipeline.store.lookup import Lookup
from pipeline.store.places import NotThere, Place
from pipeline.store.shard import Unsound, computed_by
from pipeline.store.store import Store

log = logging.getLogger(__name__)

ADOPTED = "adopted.json"
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
        """The record in adopted.json."""
        return {**vars(self), "adopted": self.adopted.described(), "by": self.by.described()}

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> Adoption:
        """The inverse of `described`. Raises DataError for what is no record, or one that no adoption could have written."""
        try:
            identities = {name: ReferenceIdentity.from_described(content[name]) for name in ("adopted", "by")}
            adoption = cls(**{**content, **identities})
            _ = adoption.words  # figures and date are there, and of their kind
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError("a record that describes no adoption") from None
        if adoption.adopted.model != adoption.by.model:
            raise DataError("a record of two models that are not the same")
        return adoption


def recorded(place: Place, reference_id: str) -> dict[str, Adoption]:
    """What a place's adopted.json says for the reference `reference_id`, by the adopted reference's id.

    A record that describes other references, or none, is not believed; that is said in a warning.
    """
    try:
        content = json.loads(place.read(ADOPTED))
        found = {adopted: Adoption.from_described(record) for adopted, record in content.items()}
    except FileNotFoundError:
        return {}
    except (DataError, ValueError, AttributeError) as error:
        log.warning("%s/%s is not believed: %s", place.name, ADOPTED, first_line(error))
        return {}
    strange = [
        adopted
        for adopted, adoption in found.items()
        if (adoption.adopted.reference_id, adoption.by.reference_id) != (adopted, reference_id)
    ]
    for adopted in strange:
        log.warning("%s/%s: the record of %s is of other references", place.name, ADOPTED, adopted[:12])
        del found[adopted]
    return found


def adoptions(store: Store) -> dict[str, Adoption]:
    """Whose scores may stand for those of the store's reference, as recorded at any of its places, by id."""
    found: dict[str, Adoption] = {}
    for place in store.places:
        found = recorded(place, store.reference.reference_id) | found
    return found


def adopt(store: Store, adoption: Adoption) -> None:
    """Record an adoption at the first place, in place of an earlier one of the same reference."""
    first = recorded(store.places[0], store.reference.reference_id)
    _record(store, first | {adoption.adopted.reference_id: adoption})


def revoke(store: Store, prefix: str) -> tuple[str, int]:
    """Take back the adoption of the reference whose id begins with `prefix`, and what was taken over from it; its id, and how many
    rows these were.

    The adopted reference keeps its scores. Raises DataError if the first place records no such adoption, or more than one.
    """
    first = recorded(place := store.places[0], store.reference.reference_id)
    found = [adopted for adopted in first if adopted.startswith(prefix)]
    if len(found) != 1:
        raise DataError(
            f"{place.name} records {len(found)} adoptions of references whose id begins with {prefix!r}: 'refscore store ls' lists "
            "them; the place that records one is to be first in reference.store"
        )
    adopted = found[0]
    _record(store, {other: adoption for other, adoption in first.items() if other != adopted})
    rows = 0
    for shard in place.listed().shards:
        # one that is gone or damaged by now is nobody's
        with suppress(NotThere, Unsound), place.opened(shard) as file:
            if computed_by(file) == adopted:
                place.remove(shard)
                rows += file.metadata.num_rows
    return adopted, rows


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
    for adopted, adoption in adoptions(store).items():
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


def _record(store: Store, records: Mapping[str, Adoption]) -> None:
    store.note(ADOPTED, {adopted: adoption.described() for adopted, adoption in records.items()})
