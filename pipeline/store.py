"""The reference store: scores of one reference in immutable Parquet shards, found by key.

A shard's name carries the sha256 of its bytes, so what is read can be checked against what was published. A shard is
written under a temporary name, re-opened and checked, flushed, and linked to its final name, which must not exist; the
directory is flushed last. Nothing is changed in place. A shard that fails a check goes to `corrupt/` and counts as not
there: its rows are scored again, a wrong number is never returned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import durable
from pipeline.digests import files_sha256
from pipeline.errors import CheckError, DataError
from pipeline.identity import ReferenceIdentity
from pipeline.schema import SCORES, write_parquet

log = logging.getLogger(__name__)

SHARD = re.compile(r"scores-([0-9a-f]{64})\.parquet")


@dataclass(frozen=True)
class Scored:
    """One scored response: the key, the prompt's length in tokens, and its logps (float32, one per token)."""

    key: bytes
    prompt_tokens: int
    logps: np.ndarray


class Store:
    """The scores of one reference below `root`. Opening creates nothing; publishing creates the directory."""

    def __init__(self, root: Path, reference: ReferenceIdentity) -> None:
        self.reference = reference
        self.directory = root / reference.reference_id

    def found(self, keys: Sequence[bytes]) -> pl.DataFrame:
        """Scores of those `keys` that the store holds: SCORES' columns, one row a key, in no particular order."""
        wanted = pl.LazyFrame({"key": list(keys)}, schema={"key": pl.Binary}).unique()
        shards = self._sound_shards()
        if not shards:
            return pl.DataFrame(schema=pl.DataFrame(pa.table(SCORES.empty_table())).schema)
        # two writers may have scored the same row: any one of the equal-keyed rows will do
        scores = pl.scan_parquet(shards)
        return scores.join(wanted, on="key", how="semi").collect(engine="streaming").unique("key", maintain_order=True)

    def held(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of `keys` the store holds; reads keys only."""
        shards = self._sound_shards()
        if not shards:
            return set()
        wanted = pl.LazyFrame({"key": list(keys)}, schema={"key": pl.Binary}).unique()
        return set(pl.scan_parquet(shards).select("key").join(wanted, on="key", how="semi").collect()["key"].to_list())

    def publish(self, rows: Sequence[Scored]) -> Path:
        """Make `rows` findable, all or none, durably.

        Raises CheckError for a value that cannot be a log-probability, RefscoreError where the disk refuses.
        """
        table = _table(rows)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._describe()
        temporary = durable.temporary_beside(self.directory / "scores.parquet")
        try:
            with durable.explaining_disk(self.directory):
                write_parquet(temporary, table, {"reference_id": self.reference.reference_id})
                _must_read_back(temporary, table)
                durable.flush(temporary)
                final = self.directory / f"scores-{files_sha256([temporary])[temporary]}.parquet"
                try:
                    os.link(temporary, final)
                except FileExistsError:
                    log.info("%s was published before with the same bytes", final.name)
                durable.flush(self.directory)
        finally:
            temporary.unlink(missing_ok=True)
        return final

    def _describe(self) -> None:
        path = self.directory / "reference.json"
        if not path.exists():
            durable.write_json(path, self.reference.described())

    def _sound_shards(self) -> list[Path]:
        shards = sorted(path for path in self.directory.glob("scores-*.parquet") if SHARD.fullmatch(path.name))
        digests = files_sha256(shards)
        sound = []
        for shard in shards:
            problem = _shard_problem(shard, digests[shard])
            if problem is None:
                sound.append(shard)
            else:
                set_aside(shard, problem)
        return sound


def set_aside(shard: Path, problem: str) -> None:
    """Move a damaged shard to `corrupt/`, where no reader looks, and say so once."""
    corrupt = shard.parent / "corrupt"
    try:
        corrupt.mkdir(exist_ok=True)
        shard.rename(corrupt / shard.name)
        log.warning("%s: %s; set aside in %s, its rows count as not scored", shard.name, problem, corrupt)
    except OSError:
        log.warning("%s: %s; it cannot be moved, its rows count as not scored", shard, problem)


def check_shard(shard: Path) -> str | None:
    """What is wrong with a shard, every byte and value looked at; None if nothing is."""
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    problem = _shard_problem(shard, digest)
    if problem:
        return problem
    table = pq.read_table(shard, page_checksum_verification=True)
    tokens = table["response_tokens"].to_numpy()
    for row, logps in enumerate(table["logps"]):
        values = logps.values.to_numpy(zero_copy_only=False)
        if problem := logps_problem(values, int(tokens[row])):
            return f"row {row}: {problem}"
        if abs(values.sum(dtype=np.float64) - table["logp"][row].as_py()) > 1e-9 * (1 + abs(values.sum())):
            return f"row {row}: logp is not the sum of logps"
    return None


def read_reference(directory: Path) -> dict[str, Any]:
    """The content of a reference's reference.json; DataError where it cannot be read."""
    try:
        content = json.loads((directory / "reference.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}/reference.json cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{directory}/reference.json holds no object")
    return content


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
    logps = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCORES.field("logps").type)
    return pa.table(
        [
            pa.array([row.key for row in rows], SCORES.field("key").type),
            pa.array([row.prompt_tokens for row in rows], pa.int32()),
            pa.array(np.diff(offsets), pa.int32()),
            logps,
            # sums of float32 logps in float64: bfloat16 or float32 sums lose whole nats on long responses
            pa.array([float(row.logps.sum(dtype=np.float64)) for row in rows], pa.float64()),
        ],
        schema=SCORES,
    )


def _must_read_back(path: Path, table: pa.Table) -> None:
    if not pq.read_table(path, page_checksum_verification=True).equals(table):
        raise CheckError(f"{path} does not read back as it was written: the disk or the memory is not sound")


def _shard_problem(shard: Path, digest: str) -> str | None:
    named = SHARD.fullmatch(shard.name)
    if named is None or named.group(1) != digest:
        return "its bytes are not those that were published"
    try:
        if not pq.read_schema(shard).remove_metadata().equals(SCORES):
            return "it has another schema"
    except (pa.ArrowException, OSError) as error:
        return f"it is not readable as Parquet ({str(error).splitlines()[0]})"
    return None
