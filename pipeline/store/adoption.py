"""Scores of one reference that may stand for another's: an engine was updated, and the numbers hardly changed.

That it may was found out on a sample, and is recorded at the reference that adopts, in adopted.json. What the adopted reference
computed is then published under the adopting one's keys, in shards that say who computed them. An adoption speaks for what the
adopted reference computed itself, not for what it took over from a third one: only the former was compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import arrays_of
from pipeline.errors import DataError, first_line
from pipeline.store.identity import ReferenceIdentity, score_key
from pipeline.store.places import Place
from pipeline.store.store import Store

log = logging.getLogger(__name__)

ADOPTED = "adopted.json"
# bytes of rows that are published together
_SHARD_BYTES = 2**26


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

    def described(self) -> dict[str, Any]:
        """The record in adopted.json."""
        return {**vars(self), "adopted": self.adopted.described(), "by": self.by.described()}

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> Adoption:
        """The inverse of `described`. Raises DataError for what is no record, or one that no adoption could have written."""
        try:
            identities = {name: ReferenceIdentity.from_described(content[name]) for name in ("adopted", "by")}
            adoption = cls(**{**content, **identities})
        except (KeyError, TypeError, AttributeError):
            raise DataError("a record that describes no adoption") from None
        if adoption.adopted.model != adoption.by.model:
            raise DataError("a record of two models that are not the same")
        return adoption


def adoptions(store: Store) -> list[Adoption]:
    """Whose scores may stand for those of the store's reference, as recorded at any of its places.

    A record that describes another reference, or none, is not believed; that is said in a warning.
    """
    found: dict[str, Adoption] = {}
    for place in store.places:
        for adopted, adoption in _recorded(place).items():
            if adoption.by == store.reference and adoption.adopted.reference_id == adopted:
                found.setdefault(adopted, adoption)
            else:
                log.warning("%s/%s: the record of %s is of other references", place.name, ADOPTED, adopted[:12])
    return list(found.values())


def serve_from_adopted(store: Store, missing: pa.Table) -> pa.Table:
    """Publish what adopted references hold of `missing`, MISSING's rows; returns the rows that are still missing.

    Raises RefscoreError if the store cannot be read or written.
    """
    for adoption in adoptions(store):
        if not len(missing):
            break
        taken = np.zeros(len(missing), dtype=bool)
        for positions, table in _together(_held(store, adoption, missing)):
            keys = missing["key"].combine_chunks().take(pa.array(positions))
            store.publish_table(
                table.set_column(0, SCORES.field("key"), keys), computed_by=adoption.adopted.reference_id
            )
            taken[positions] = True
        missing = missing.filter(pa.array(~taken))
    return missing


def _held(store: Store, adoption: Adoption, missing: pa.Table) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Positions of `missing` of which the adopted reference computed a score, in parts, each with its SCORES rows."""
    reference_id = adoption.adopted.reference_id
    ids = zip(arrays_of(missing, "prompt_ids"), arrays_of(missing, "response_ids"), strict=True)
    keys = pa.array([score_key(reference_id, prompt, response) for prompt, response in ids], pa.binary(32))
    lookup = store.of(adoption.adopted).lookup(keys)
    theirs = [np.empty(0, np.int64), *lookup.held_from_adopted().values()]
    return lookup.rows(np.setdiff1d(lookup.held, np.concatenate(theirs)))


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


def _recorded(place: Place) -> dict[str, Adoption]:
    """What stands in a place's adopted.json, by the adopted reference's id."""
    try:
        content = json.loads(place.read(ADOPTED))
        return {adopted: Adoption.from_described(record) for adopted, record in content.items()}
    except FileNotFoundError:
        return {}
    except (DataError, ValueError, AttributeError) as error:
        log.warning("%s/%s is not believed: %s", place.name, ADOPTED, first_line(error))
        return {}
