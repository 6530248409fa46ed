"""One shard: its name, what must hold of its bytes and rows, and opening it so that damage of any kind has one name.

Page checksums cover the pages' content. They cover neither the footer nor the headers of pages, so no row is believed
because the file could be read: who takes rows compares their keys and asks `shard_problem`.

Most forms in which others keep scores have one sum per response. A shard of imported scores may hold sums only: it says so of
itself, and its lists of values are empty. In every other shard an empty list is damage.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.schemas import COMPUTED_BY, ROUNDED_SCORES, SCORES
from pipeline.artifacts.tables import about_in
from pipeline.errors import RefscoreError, first_line
from pipeline.store.fixed_point import LARGEST_ERROR, LOWEST, restored

SHARD = re.compile(r"scores-([0-9a-f]{64})\.parquet")
# what a shard says of itself if its rows have no values per token
SUMS_ONLY = "sums_only"
# relative to the sum: far above the rounding of a sum in float64, far below what a changed float32 makes
_SUM_TOLERANCE = 1e-11


class Unsound(Exception):
    """A shard that could not be read, or rows of it that cannot be true; the message says what was seen."""


@dataclass(frozen=True)
class ShardFacts:
    """What is to be known of a shard beside its keys, without opening it: its name and number of rows, and what it says of itself.
    `computed_by` is "" if no other reference did.
    """

    name: str
    rows: int
    published: int
    sums_only: bool
    computed_by: str


def digest_in(name: str) -> str | None:
    """The sha256 that a shard's name promises."""
    promised = SHARD.fullmatch(name)
    return promised.group(1) if promised else None


def sha256_now(path: Path) -> str:
    """sha256 (hex) of the file's bytes, read now, whatever is remembered of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OpenShard:
    """A shard that is open: what it says of itself, and its rows, in SCORES' form however they are stored."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self.metadata: pq.FileMetaData = file.metadata
        self.schema_arrow: pa.Schema = file.schema_arrow
        self.rounded = file.schema_arrow.remove_metadata().equals(ROUNDED_SCORES)

    @property
    def num_row_groups(self) -> int:
        """How many parts it can be read in."""
        return int(self.metadata.num_row_groups)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows, or some columns of them."""
        return self._as_scores(self._file.read(columns=columns))

    def read_row_group(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of a part, or some columns of them."""
        return self._as_scores(self._file.read_row_group(number, columns=columns))

    def _as_scores(self, table: pa.Table) -> pa.Table:
        return restored(table) if self.rounded else table


def shard_names(directory: Path) -> list[str]:
    """Every file whose name is a shard's name, damaged or not, but no dangling link; none in a directory that is not there."""
    try:
        with os.scandir(directory) as entries:
            # told by the directory itself, unless it is a link: no file is looked at
            return sorted(entry.name for entry in entries if SHARD.fullmatch(entry.name) and entry.is_file())
    except FileNotFoundError:
        return []


def shard_files(directory: Path) -> list[Path]:
    """The paths of `shard_names`."""
    return [directory / name for name in shard_names(directory)]


@contextmanager
def open_shard(shard: Path, file: io.RawIOBase | BinaryIO | None = None) -> Iterator[OpenShard]:
    """The shard, if it has the schema of SCORES or of ROUNDED_SCORES, page checksums verified. Its bytes are read from `file`, if
    that is given.

    Raises Unsound, here and in the block, for whatever damaged bytes make the reader raise; FileNotFoundError for a file
    that is gone; RefscoreError for one that this user may not read.
    """
    try:
        # of bytes that come from afar a row group's are asked for together
        with pq.ParquetFile(file or shard, page_checksum_verification=True, pre_buffer=file is not None) as parquet:
            opened = OpenShard(parquet)
            if not opened.rounded and not parquet.schema_arrow.remove_metadata().equals(SCORES):
                raise Unsound("it has another schema")
            yield opened
    except (Unsound, FileNotFoundError):
        raise
    except PermissionError:
        raise RefscoreError(
            f"{shard} may not be read by this user: ask for the right to read it, or leave its place out of reference.store"
        ) from None
    except Exception as error:  # noqa: BLE001  # what a Parquet reader raises for damaged bytes knows no bounds
        raise Unsound(f"it is not readable as Parquet ({first_line(error)})") from None


def published_at(file: OpenShard) -> int:
    """When the rows of an open shard were published: nanoseconds since 1970 by the publisher's clock; 0 if it does not say."""
    published = about_in(file.schema_arrow).get("published")
    return published if isinstance(published, int) else 0


def sums_only(file: OpenShard) -> bool:
    """Whether an open shard says that it holds sums of responses, and no values of tokens."""
    return about_in(file.schema_arrow).get(SUMS_ONLY) is True


def computed_by(file: OpenShard) -> str:
    """The id of the reference that computed an open shard's rows, if that is not the one whose shard it is; else nothing."""
    said = about_in(file.schema_arrow).get(COMPUTED_BY)
    return said if isinstance(said, str) else ""


def facts_of(name: str, file: OpenShard) -> ShardFacts:
    """What is to be known of an open shard."""
    return ShardFacts(name, file.metadata.num_rows, published_at(file), sums_only(file), computed_by(file))


def shard_problem(file: OpenShard, table: pa.Table) -> str | None:
    """Why rows of an open shard cannot be true; None if they can."""
    return sums_problem(table) if sums_only(file) else rows_problem(table, rounded=file.rounded)


def sums_problem(table: pa.Table) -> str | None:
    """Why rows of SCORES that hold sums only cannot be true; None if they can."""
    if any(column.null_count for column in table.columns):
        return "a value is absent"
    tokens, sums = table["response_tokens"].to_numpy(), table["logp"].to_numpy()
    given = np.diff(table["logps"].combine_chunks().offsets.to_numpy())
    for wrong, words in (
        (given != 0, "values of tokens among sums"),
        (tokens < 1, "no tokens"),
        (~np.isfinite(sums), "logp is not finite"),
        (sums > 0, "logp is above 0"),
    ):
        if wrong.any():
            return f"row {int(np.argmax(wrong))}: {words}"
    return None


def rows_problem(table: pa.Table, *, rounded: bool = False) -> str | None:
    """Why rows of SCORES cannot be true: lengths, values and sums of every one; None if they can.

    `rounded`: their logps are stored in fixed point, or will be, so that sums are of values that differ a little.
    """
    if any(column.null_count for column in table.columns):
        return "a value is absent"
    logps, tokens, sums = table["logps"].combine_chunks(), table["response_tokens"].to_numpy(), table["logp"].to_numpy()
    lengths = np.diff(logps.offsets.to_numpy())
    values = logps.flatten().to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, tokens) or (lengths < 1).any():
        row = int(np.argmax((lengths != tokens) | (lengths < 1)))
        return f"row {row}: {lengths[row]} values for {tokens[row]} tokens"
    impossible = ~np.isfinite(values) | (values > 0)
    if impossible.any():
        row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(impossible)), side="right"))
        return f"row {row}: {logps_problem(logps[row].values.to_numpy(zero_copy_only=False), int(tokens[row]))}"
    if rounded and (values < LOWEST).any():
        row = int(np.searchsorted(np.cumsum(lengths), int(np.argmin(values)), side="right"))
        return f"row {row}: {values.min()} is too low for fixed point"
    if len(table):
        totals = np.add.reduceat(values.astype(np.float64), np.cumsum(lengths) - lengths)
        # written so that a sum that is NaN is a problem too
        rounding = LARGEST_ERROR * tokens if rounded else 0
        wrong = ~(np.abs(totals - sums) <= _SUM_TOLERANCE * (1 + np.abs(totals)) + rounding)
        if wrong.any():
            return f"row {int(np.argmax(wrong))}: logp is not the sum of logps"
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


def check_shard(shard: Path) -> str | None:
    """What is wrong with a shard, every byte and value looked at now; None if nothing is.

    Raises FileNotFoundError if it is gone, RefscoreError if it may not be read.
    """
    try:
        with open_shard(shard) as file:
            if digest_in(shard.name) != sha256_now(shard):
                return "its bytes are not those that were published"
            seen: list[np.ndarray] = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                if problem := shard_problem(file, table):
                    return f"row group {group}, {problem}"
                seen.append(key_words(table))
            words = np.concatenate([np.empty((0, 4), np.uint64), *seen])
            if len(np.unique(words, axis=0)) != len(words):
                return "it holds a key twice"
    except Unsound as unsound:
        try:
            same = digest_in(shard.name) == sha256_now(shard)
        except FileNotFoundError:
            raise
        except OSError as error:
            return f"it cannot be read ({first_line(error)})"
        return str(unsound) if same else f"its bytes are not those that were published ({unsound})"
    return None


def key_words(table: pa.Table) -> np.ndarray:
    """The keys of rows of SCORES as rows of four 64-bit numbers."""
    return words_of(table["key"].combine_chunks())


def words_of(keys: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Keys as rows of four 64-bit numbers, without a copy."""
    if not len(keys):
        return np.empty((0, 4), dtype=np.uint64)
    return np.frombuffer(keys.buffers()[1], dtype=np.uint64).reshape(-1, 4)[keys.offset : keys.offset + len(keys)]
