"""The reference store: scores of one reference in immutable Parquet shards on one or more shelves, found by key.

A shard's name carries the sha256 of its bytes, so what is read can be checked against what was published. A shard is
written under a temporary name, re-opened and checked, flushed, and given its final name, which must not exist; the
directory is flushed last. Nothing is changed in place. A shard that fails a check goes to `corrupt/` and counts as not
there: its rows are scored again, a wrong number is never returned.

The first place of a store is written, all are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import durable
from pipeline.errors import CheckError, DataError
from pipeline.identity import ReferenceIdentity
from pipeline.lookup import Lookup
from pipeline.schema import SCORES, write_parquet
from pipeline.shelf import digest_in, open_shelf


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
        self.shelves = [open_shelf(place, reference.reference_id) for place in places]

    def lookup(self, keys: pa.FixedSizeBinaryArray) -> Lookup:
        """Where each of `keys` stands; reads the shards' keys. Raises DataError where a shard cannot be read."""
        return Lookup(lambda: [shard for shelf in self.shelves for shard in shelf.shards()], keys)

    def why_not_writable(self) -> str | None:
        """Why nothing can be published; None if it can."""
        return self.shelves[0].why_not_writable()

    def publish(self, rows: Sequence[Scored]) -> None:
        """Make `rows` findable, all or none, durably.

        Raises CheckError for a value that cannot be a log-probability, RefscoreError where the disk refuses.
        """
        self.publish_table(_table(rows))

    def publish_table(self, table: pa.Table) -> str:
        """Publish rows that are in SCORES' form already; returns the shard's name."""
        durable.reached("publish: begun")
        shelf = self.shelves[0]
        with durable.explaining_disk(Path(shelf.name), table.nbytes):
            temporary = durable.temporary_beside(shelf.workspace() / "scores.parquet")
            try:
                about = temporary.with_name(f"{temporary.name}.json")
                about.write_text(json.dumps(self.reference.described(), indent=2) + "\n", encoding="utf-8")
                shelf.publish(about, "reference.json")
                durable.reached("publish: reference described")
                write_parquet(temporary, table, {"reference_id": self.reference.reference_id})
                durable.reached("publish: written")
                _must_read_back(temporary, table)
                durable.reached("publish: checked")
                durable.flush(temporary)
                durable.reached("publish: flushed")
                name = f"scores-{_sha256(temporary)}.parquet"
                shelf.publish(temporary, name)
            finally:
                temporary.unlink(missing_ok=True)
                about.unlink(missing_ok=True)
        durable.reached("publish: done")
        return name


def read_reference(directory: Path) -> dict[str, Any]:
    """The content of a reference's reference.json; DataError where it cannot be read."""
    try:
        content = json.loads((directory / "reference.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}/reference.json cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{directory}/reference.json holds no object")
    return content


def check_shard(shard: Path) -> str | None:
    """What is wrong with a shard, every byte and value looked at; None if nothing is."""
    if digest_in(shard.name) != _sha256(shard):
        return "its bytes are not those that were published"
    try:
        if not pq.read_schema(shard).remove_metadata().equals(SCORES):
            return "it has another schema"
        table = pq.read_table(shard, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        return f"it is not readable as Parquet ({str(error).splitlines()[0]})"
    tokens, sums = table["response_tokens"].to_numpy(), table["logp"].to_numpy()
    for row, logps in enumerate(table["logps"]):
        values = logps.values.to_numpy(zero_copy_only=False)
        if problem := logps_problem(values, int(tokens[row])):
            return f"row {row}: {problem}"
        if abs(values.sum(dtype=np.float64) - sums[row]) > 1e-9 * (1 + abs(sums[row])):
            return f"row {row}: logp is not the sum of logps"
    return None


def logps_problem(logps: np.ndarray, tokens: int) -> str | None:
    """Why these values cannot be the log-probabilities of `tokens` tokens; None if they can."""
    if len(logps) != tokens:
        return f"{len(logps)} values for {tokens} tokens"
    if not np.isfinite(logps).all():
        return f"value {int(np.argmin(np.isfinite(logps)))} is not finite"
    if (logps > 0).any():
        return f"value {int(np.argmax(logps > 0))} is {float(logps.max())}, above 0"
    return None


def _table(rows: Sequence[Scored]) -> pa.Table:
    for row in rows:
        problem = logps_problem(row.logps, len(row.logps)) or (None if len(row.logps) else "no token")
        if problem:
            raise CheckError(f"refusing to store a score that cannot be true: {problem} (key {row.key.hex()[:12]})")
    offsets = np.cumsum([0, *(len(row.logps) for row in rows)], dtype=np.int32)
    values = np.concatenate([row.logps for row in rows]).astype(np.float32) if rows else np.zeros(0, np.float32)
    return pa.table(
        [
            pa.array([row.key for row in rows], SCORES.field("key").type),
            pa.array([row.prompt_tokens for row in rows], pa.int32()),
            pa.array(np.diff(offsets), pa.int32()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCORES.field("logps").type),
            # sums of float32 logps in float64: bfloat16 or float32 sums lose whole nats on long responses
            pa.array([float(row.logps.sum(dtype=np.float64)) for row in rows], pa.float64()),
        ],
        schema=SCORES,
    )


def _must_read_back(path: Path, table: pa.Table) -> None:
    if not pq.read_table(path, page_checksum_verification=True).equals(table):
        raise CheckError(f"{path} does not read back as it was written: the disk or the memory is not sound")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
