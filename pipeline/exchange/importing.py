"""Scores that others computed, into the store, under an identity that says so.

All rows are read and looked at before any is published: what contradicts itself, or what was imported before, is refused whole.
Memory holds some hundred bytes per sequence; token ids become keys at once, values per token wait in a temporary file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import list_column
from pipeline.config.experiment import DataConfig
from pipeline.engines.reference import OpenedReference
from pipeline.errors import CheckError, DataError, RefscoreError
from pipeline.exchange.claims import Claim, Claimed, ClaimedPair, noise
from pipeline.exchange.imported_scores import FORMS, claimed_pairs, form_of
from pipeline.exchange.scored_pairs import SIDES
from pipeline.hardware import return_freed_memory
from pipeline.models.configuration import text_config
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.precompute.responses import preference_of
from pipeline.store.identity import score_key
from pipeline.store.shard import words_of
from pipeline.store.store import Store

# rows that are made a table together, and values per token that a shard holds
_ROWS, _VALUES = 4096, 2**22
_SUMS_IN_A_SHARD = 2**18


@dataclass
class Dropped:
    """Rows that were left out for one reason: how many, and the first."""

    count: int
    first: str


@dataclass
class Imported:
    """What was read and what became of it: `rows` are kept or `dropped`; of the two sequences of each that is kept `new` ones
    were published, `repeated` ones stand in another row too, `there` were imported before, `known_by_sum` of them without the
    values per token that they have now.
    """

    form: str
    rows: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    new: int = 0
    repeated: int = 0
    there: int = 0
    known_by_sum: int = 0

    @property
    def kept(self) -> int:
        """Rows that were not dropped."""
        return self.rows - sum(drop.count for drop in self.dropped.values())

    def drop(self, pair: ClaimedPair) -> None:
        """Count a row that is left out."""
        known = self.dropped.setdefault(pair.reason, Dropped(0, f"{pair.source} row {pair.row}"))
        known.count += 1


def import_scores(path: Path, form: str | None, reference: OpenedReference, store: Store, data: DataConfig) -> Imported:
    """Publish the scores that `path` holds in `form` (None: found out) under the identity of `reference`, an imported one.

    Raises DataError for files that cannot be read or are of another vocabulary, for scores that contradict one another or what
    was imported before, and if every row is dropped; RefscoreError if the store cannot be written.
    """
    if problem := store.why_not_writable():
        raise RefscoreError(
            f"the store cannot be written ({problem}): put a directory of your own first in reference.store"
        )
    imported = Imported(form or form_of(path))
    claimed = _claimed(reference, data, texts=imported.form == FORMS[-1])
    with tempfile.NamedTemporaryFile(prefix="imported-", dir=durable.scratch_place()) as file:
        claims = _Claims(reference.identity.reference_id)
        with durable.explaining_disk(Path(file.name)), pa.ipc.new_file(file.name, SCORES) as writer:
            pairs = claimed_pairs(path, imported.form, claimed)
            while part := list(islice(pairs, _ROWS)):
                if len(table := claims.take(part, imported)):
                    writer.write_table(table)
        if not imported.kept:
            reasons = "; ".join(
                f"{drop.count} {reason} (first: {drop.first})" for reason, drop in imported.dropped.items()
            )
            raise DataError(f"{path}: of {imported.rows} rows none can be imported{reasons and f': {reasons}'}")
        table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
        _publish(table, claims, store, imported)
    return_freed_memory()
    if 2 * imported.kept != imported.new + imported.repeated + imported.there:
        raise CheckError(f"the rows of {path} and what became of them do not add up: {imported}")
    return imported


class _Claims:
    """What is kept of every claim while it is read: where it stands, its key, tokens and sum."""

    def __init__(self, reference_id: str) -> None:
        self._reference_id = reference_id
        self._sources: list[str] = []
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def take(self, pairs: list[ClaimedPair], imported: Imported) -> pa.Table:
        """The claims of some rows as rows of SCORES, in order; those that are left out are counted."""
        claims: list[Claim] = []
        sources, rows = [], []
        for pair in pairs:
            imported.rows += 1
            if not pair.claims:
                imported.drop(pair)
                continue
            if not self._sources or self._sources[-1] != pair.source:
                self._sources.append(pair.source)
            claims += pair.claims
            sources.append(len(self._sources) - 1)
            rows.append(pair.row)
        self._parts.append((np.array(sources, np.int32), np.array(rows, np.int64)))
        return _table(self._reference_id, claims)

    def place(self, number: int) -> str:
        """Where the claim stands, for people."""
        at = number // len(SIDES)
        for sources, rows in self._parts:
            if at < len(rows):
                return f"{self._sources[sources[at]]} row {rows[at]} {SIDES[number % len(SIDES)]}"
            at -= len(rows)
        raise IndexError(number)


def _table(reference_id: str, claims: list[Claim]) -> pa.Table:
    nothing = np.empty(0, np.float32)
    return pa.table(
        [
            pa.array([score_key(reference_id, one.prompt_ids, one.response_ids) for one in claims], pa.binary(32)),
            pa.array([len(one.prompt_ids) for one in claims], pa.int32()),
            pa.array([len(one.response_ids) for one in claims], pa.int32()),
            list_column([nothing if one.logps is None else one.logps for one in claims], SCORES.field("logps").type),
            pa.array([one.logp for one in claims], pa.float64()),
        ],
        schema=SCORES,
    )


def _publish(table: pa.Table, claims: _Claims, store: Store, imported: Imported) -> None:
    """Publish what is new of `table`, once. Raises DataError for contradictions, before anything is published."""
    keys = table["key"].combine_chunks()
    tokens, sums = table["response_tokens"].to_numpy(), table["logp"].to_numpy()
    _, firsts, number = np.unique(words_of(keys), axis=0, return_index=True, return_inverse=True)
    number = number.reshape(-1)
    imported.repeated = len(keys) - len(firsts)
    allowed = noise(tokens, sums, store.reference.numerics.dtype)
    _must_agree(firsts[number], sums, allowed, claims)
    positions = np.sort(firsts)
    lookup = store.lookup(keys.take(pa.array(positions)))
    values = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table["logps"].chunks])
    for held, rows in lookup.rows(lookup.held):
        _must_be_as_before(positions[held], rows["logp"].to_numpy(), sums, allowed, claims)
    imported.there = len(lookup.held)
    imported.known_by_sum = int((values[positions[lookup.held_as_sums]] > 0).sum())
    fresh = positions[lookup.missing]
    for shard in _shards(fresh, values):
        store.publish_table(table.take(pa.array(shard)).combine_chunks(), [{"imported_as": imported.form}])
        imported.new += len(shard)
    store.finish()


def _must_agree(first: np.ndarray, sums: np.ndarray, allowed: np.ndarray, claims: _Claims) -> None:
    """Raise DataError if two claims of the same sequence differ by more than noise; `first` of each is its first claim's place."""
    apart = np.abs(sums - sums[first]) > allowed
    if apart.any():
        later = int(np.argmax(apart))
        earlier = int(first[later])
        raise DataError(
            f"{claims.place(earlier)} and {claims.place(later)} are the same response to the same prompt with two scores "
            f"({sums[earlier]:.4f} and {sums[later]:.4f} nats; {int(apart.sum())} such claims), further apart than arithmetic in "
            "this dtype takes them (reference.dtype), so one of them is wrong: remove it, or import each model's file under its "
            "own model and name. Nothing was imported"
        )


def _must_be_as_before(
    places: np.ndarray, before: np.ndarray, sums: np.ndarray, allowed: np.ndarray, claims: _Claims
) -> None:
    apart = np.abs(before - sums[places]) > allowed[places]
    if apart.any():
        at = int(np.argmax(apart))
        raise DataError(
            f"{claims.place(int(places[at]))} has the score {sums[places[at]]:.4f}, and {before[at]:.4f} nats were imported for "
            f"the same response under this name before ({int(apart.sum())} such claims here): give these scores another name with "
            "--by. Nothing was imported"
        )


def _shards(positions: np.ndarray, values: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of rows for one shard each: sums and values per token apart, so many that memory stays small."""
    sums = positions[values[positions] == 0]
    for start in range(0, len(sums), _SUMS_IN_A_SHARD):
        yield sums[start : start + _SUMS_IN_A_SHARD]
    whole = positions[values[positions] > 0]
    if len(whole):
        number = np.cumsum(values[whole], dtype=np.int64) // _VALUES
        yield from np.split(whole, np.flatnonzero(np.diff(number)) + 1)


def _claimed(reference: OpenedReference, data: DataConfig, *, texts: bool) -> Claimed:
    """The reference's; forms of texts need to know whether this experiment's prompts begin with a begin token, which is in none."""
    tokenizer = reference.tokenizer
    size = int(text_config(reference.paths.base, trusts_code=reference.config.trust_remote_code).vocab_size)
    begins = False
    if texts:
        (one,) = Encoder(data, tokenizer).chosen([preference_of("", 0, {"prompt": "a", "response": "b"})])
        begins = isinstance(one, Encoded) and one.prompt_ids[:1] == [tokenizer.bos_token_id]
    return Claimed(max(size, len(tokenizer)), reference.numerics.dtype, tokenizer, begins)
