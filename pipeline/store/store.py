"""The reference store: scores of one reference in immutable Parquet shards on one or more places, found by key.

A shard's name carries the sha256 of its bytes, so what is read can be checked against what was published. A shard is
written under a temporary name, re-opened and checked, flushed, and given its final name, which must not exist; the
directory is flushed last. Nothing is changed in place. A shard that fails a check goes to `corrupt/` and counts as not
there: its rows are scored again, a wrong number is never returned.

The first place of a store is written, all are read. What a shard says of itself, beside its rows: when it was published
(nanoseconds since 1970), and the circumstances that the reference's identity leaves out on purpose.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import COMPUTED_BY, ROUNDED_SCORES, SCORES
from pipeline.artifacts.tables import list_column, parquet_writer, row_groups
from pipeline.errors import CheckError, DataError, RefscoreError, first_line
from pipeline.store.fixed_point import FIXED_POINT, rounded
from pipeline.store.identity import IMPORTED, ReferenceIdentity
from pipeline.store.local_places import LocalPlace
from pipeline.store.lookup import Lookup
from pipeline.store.places import Place, is_url
from pipeline.store.registrations import register
from pipeline.store.remote_places import RemotePlace
from pipeline.store.shard import SUMS_ONLY, key_words, rows_problem, sha256_now, sums_problem

# a temporary file can be swept by somebody else's tidying, if clocks differ by a day; the rows are still at hand
_TRIES = 3


@dataclass(frozen=True)
class Scored:
    """One scored response: the key, the prompt's length in tokens, and its logps (float32, one per token)."""

    key: bytes
    prompt_tokens: int
    logps: np.ndarray


class Store:
    """The scores of one reference at `places` (directories or URLs). Opening creates nothing."""

    def __init__(self, places: Sequence[str], reference: ReferenceIdentity) -> None:
        self.reference = reference
        self._named, self._others = tuple(places), dict[str, Store]()
        self.places = [
            open_place(place, reference.reference_id, first=number == 0) for number, place in enumerate(places)
        ]

    def lookup(self, keys: pa.FixedSizeBinaryArray, *, listed_within: float = 0) -> Lookup:
        """Where each of `keys` stands, in shards that were listed at most `listed_within` seconds ago: who asks often need not list
        as often, and may miss what others published since. Raises RefscoreError if a place or shard may not be read.
        """
        return Lookup(self.places, keys, listed_within=listed_within)

    def of(self, reference: ReferenceIdentity) -> Store:
        """The scores of another reference at the same places; each time the same object, as places remember what they read."""
        if reference.reference_id not in self._others:
            self._others[reference.reference_id] = Store(self._named, reference)
        return self._others[reference.reference_id]

    def why_not_writable(self) -> str | None:
        """Why nothing can be published; None if it can."""
        return self.places[0].why_not_writable()

    def publish(self, rows: Sequence[Scored], circumstances: Mapping[str, str] | None = None) -> None:
        """Make `rows` findable, all or none, durably; `circumstances` are kept beside them.

        Raises CheckError for a value that cannot be a log-probability, RefscoreError if the disk refuses.
        """
        self.publish_table(_table(rows), [dict(circumstances or {})])

    def publish_table(
        self,
        table: pa.Table,
        circumstances: Sequence[Mapping[str, str]] = (),
        published: int | None = None,
        computed_by: str = "",
    ) -> str:
        """Publish rows that are in SCORES' form already; returns the shard's name.

        `published` is when the rows were first published, by default now; `computed_by` the id of an adopted reference that
        computed them. Rows of imported scores may have empty lists of values, all or none of them. Raises like `publish`, and
        CheckError if a key stands twice.
        """
        sums = self.reference.numerics.engine == IMPORTED and _without_values(table)
        _must_be_true(table, sums=sums, rounded=self._rounds)
        about = {
            "reference_id": self.reference.reference_id,
            "published": time.time_ns() if published is None else published,
            "circumstances": [dict(circumstance) for circumstance in circumstances],
            **({SUMS_ONLY: True} if sums else {}),
            **({COMPUTED_BY: computed_by} if computed_by else {}),
        }
        return self.publish_parts(lambda: iter([table]), about, table.nbytes)

    def publish_parts(self, parts: Callable[[], Iterator[pa.Table]], about: dict[str, Any], size: int) -> str:
        """Publish rows in SCORES' form that come in parts, of which memory holds about one; returns the shard's name.

        The parts are asked for twice, to be written and to be compared with what was written. They must be true, and hold no key
        twice. `about` is what the shard says of itself, `size` about the bytes that it needs. Raises like `publish`.
        """
        for _ in range(_TRIES):
            try:
                return self._publish(parts, about, size)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RefscoreError(
                    f"{self.places[0].name} cannot be written ({first_line(error)}): what was published before stays; choose "
                    "another place, or mend this one, and run the same command again"
                ) from None
        raise RefscoreError(
            f"{self.places[0].name}: a file is removed each time before it is published, {_TRIES} times now: "
            "is something else tidying this directory?"
        )

    def finish(self) -> None:
        """Nothing more is published for now: have the index speak of all that was. Whatever refuses that is logged alone."""
        self.places[0].indexes.finish()

    def note(self, name: str, content: Any) -> None:
        """Keep JSON beside the scores in the first place, durably and in one step, in place of what stood under that name.

        Raises RefscoreError if the place refuses.
        """
        place = self.places[0]
        with durable.explaining_disk(Path(place.name)):
            self._describe()
            place.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def register(self, run: Path) -> None:
        """Leave word, in every place of the store that holds something of it and can be written, that `run` uses this reference."""
        for place in self.places:
            register(place, run)

    def _publish(self, parts: Callable[[], Iterator[pa.Table]], about: dict[str, Any], size: int) -> str:
        durable.reached("publish: begun")
        place = self.places[0]
        with durable.explaining_disk(Path(place.name), size):
            temporary = durable.temporary_beside(place.workspace() / "scores.parquet")
            try:
                self._describe()
                durable.reached("publish: reference described")
                with parquet_writer(temporary, ROUNDED_SCORES if self._rounds else SCORES, about) as writer:
                    for group in self._groups(parts()):
                        writer.write_table(group)
                durable.reached("publish: written")
                _must_read_back(temporary, self._groups(parts()))
                durable.reached("publish: checked")
                durable.flush(temporary)
                durable.reached("publish: flushed")
                name = f"scores-{sha256_now(temporary)}.parquet"
                place.publish(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)
        durable.reached("publish: done")
        return name

    @property
    def _rounds(self) -> bool:
        return self.reference.numerics.logps == FIXED_POINT

    def _groups(self, parts: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Rows as they are stored, in parts that are written together."""
        return row_groups(rounded(part) if self._rounds else part for part in parts)

    def _describe(self) -> None:
        _publish_json(self.places[0], "reference.json", self.reference.described())


def open_place(place: str, reference_id: str, *, first: bool) -> Place:
    """One reference's part of a directory or a URL; `first` is the place that is written. Opening creates nothing."""
    if is_url(place):
        return RemotePlace(place, reference_id)
    return LocalPlace(Path(place).expanduser() / reference_id, first=first)


def read_reference(place: Place) -> dict[str, Any]:
    """The content of a reference's reference.json; DataError if it cannot be read, or describes no reference."""
    file = f"{place.name}/reference.json"
    try:
        content = json.loads(place.read("reference.json"))
    except (OSError, ValueError, RefscoreError) as error:
        raise DataError(f"{file} cannot be read ({first_line(error)}): the next precompute writes it anew") from None
    if not isinstance(content, dict) or not isinstance(content.get("numerics"), dict):
        raise DataError(f"{file} describes no reference: the next precompute writes it anew")
    return content


def _publish_json(place: Place, name: str, content: Any) -> None:
    temporary = durable.temporary_beside(place.workspace() / name)
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        durable.flush(temporary)
        place.publish(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


def _table(rows: Sequence[Scored]) -> pa.Table:
    return pa.table(
        [
            pa.array([row.key for row in rows], SCORES.field("key").type),
            pa.array([row.prompt_tokens for row in rows], pa.int32()),
            pa.array([len(row.logps) for row in rows], pa.int32()),
            list_column([row.logps for row in rows], SCORES.field("logps").type),
            # sums of float32 logps in float64: bfloat16 or float32 sums lose whole nats on long responses
            pa.array([float(row.logps.sum(dtype=np.float64)) for row in rows], pa.float64()),
        ],
        schema=SCORES,
    )


def _without_values(table: pa.Table) -> bool:
    return len(table) > 0 and not pc.max(pc.list_value_length(table["logps"])).as_py()


def _must_be_true(table: pa.Table, *, sums: bool, rounded: bool) -> None:
    if problem := sums_problem(table) if sums else rows_problem(table, rounded=rounded):
        raise CheckError(f"refusing to store a score that cannot be true: {problem}")
    words = key_words(table)
    if len(np.unique(words, axis=0)) != len(words):
        raise CheckError("refusing to store two scores of one key: one of them could not be found again")


def _must_read_back(path: Path, groups: Iterator[pa.Table]) -> None:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        written = (file.read_row_group(number) for number in range(file.num_row_groups))
        for group, back in zip_longest(groups, written):
            if group is None or back is None or not back.equals(group):
                raise CheckError(f"{path} does not read back as it was written: the disk or the memory is not sound")
