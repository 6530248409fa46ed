"""Pairs on disk: an experiment's tokenised pairs as a Parquet file of row groups, so that memory does not grow with rows.

Owns the working file between reading the data and writing pairs.parquet: the same columns, without scores. What stays in
memory is a few numbers per pair. The file is deleted when its `PairTable` is garbage-collected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.durable import explaining_disk, scratch_place
from pipeline.artifacts.schemas import DROPPED, PAIRS
from pipeline.config.experiment import DataConfig
from pipeline.pairs.preferences import Dropped, must_balance
from pipeline.pairs.splits import Pair, PairStream, must_train, prompt_text

GROUP = 2048
TEXT = pa.schema([column for column in PAIRS if not column.name.startswith("ref_")])


@dataclass
class DropCount:
    """How many rows one reason dropped, and the first of them."""

    count: int
    first: Dropped


@dataclass
class PairTable:
    """Tokenised pairs in a file, rows numbered from 0; a position is 2 x row for chosen, and one more for rejected.

    `prompt_tokens` [rows] and `response_tokens` [2 x rows] are lengths; `cut_off` counts responses without an end token as they
    were not ended, `judges` training pairs by the judge that made them ("": their rows do not say), `control` rows that name a
    control token; `unread` are columns that nothing reads, of each source.
    """

    formats: dict[str, str]
    digests: dict[str, str]
    directory: tempfile.TemporaryDirectory[str] = field(repr=False)
    splits: dict[str, int] = field(default_factory=dict)
    cut_off: int = 0
    judges: dict[str, int] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)
    control: dict[str, int] = field(default_factory=dict)
    drops: dict[str, DropCount] = field(default_factory=dict)
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    response_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def dropped(self) -> int:
        """Rows that became no pair."""
        return sum(drop.count for drop in self.drops.values())

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the sequences at `positions`, prompt included."""
        lengths_of_positions: np.ndarray = self.prompt_tokens[positions // 2] + self.response_tokens[positions]
        return lengths_of_positions

    def groups(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Row groups in order, each with the number of its first row."""
        with pq.ParquetFile(self._pairs) as file:
            first = 0
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=columns)
                yield first, table
                first += len(table)

    def row(self, number: int) -> dict[str, Any]:
        """One pair under its names in pairs.parquet."""
        table: pa.Table = _group(self._pairs, number // GROUP)
        pair: dict[str, Any] = table.slice(number % GROUP, 1).to_pylist()[0]
        return pair

    def source_rows(self) -> np.ndarray:
        """Number of each pair's row in its source."""
        return np.concatenate([table["source_row"].to_numpy() for _, table in self.groups(["source_row"])])

    def dropped_table(self) -> pa.Table:
        """dropped.parquet's content."""
        return pq.read_table(Path(self.directory.name) / "dropped.parquet")

    @property
    def _pairs(self) -> Path:
        return Path(self.directory.name) / "pairs.parquet"


def write_pairs(data: DataConfig, stream: PairStream, on_group: Callable[[pa.Table], None]) -> PairTable:
    """Read the stream to its end into a new table; `on_group` sees every row group as it is written.

    Raises DataError if nothing is left to train on, and what the stream raises.
    """
    directory = tempfile.TemporaryDirectory(prefix="pairs-", dir=scratch_place())
    pair_table = PairTable(stream.formats, stream.digests, directory)
    prompts, responses = [pair_table.prompt_tokens], [pair_table.response_tokens]
    with (
        explaining_disk(Path(directory.name)),
        pq.ParquetWriter(Path(directory.name) / "pairs.parquet", TEXT, compression="zstd") as pairs,
        pq.ParquetWriter(Path(directory.name) / "dropped.parquet", DROPPED, compression="zstd") as dropped,
    ):
        for kept, left_out in _chunks(stream):
            dropped.write_table(_dropped(left_out))
            for row in left_out:
                pair_table.drops.setdefault(row.reason, DropCount(0, row)).count += 1
            if not kept:
                continue
            table = _table(kept)
            pairs.write_table(table, row_group_size=GROUP)
            on_group(table)
            for pair in kept:
                pair_table.splits[pair.split] = pair_table.splits.get(pair.split, 0) + 1
                pair_table.cut_off += len(pair.preference.cut_off)
                if pair.split == "train":
                    judge = pair.preference.judge
                    pair_table.judges[judge] = pair_table.judges.get(judge, 0) + 1
            prompts.append(_lengths(table, "prompt_ids"))
            response_lengths = [_lengths(table, name) for name in ("chosen_ids", "rejected_ids")]
            responses.append(np.stack(response_lengths, axis=1).ravel())
    pair_table.prompt_tokens, pair_table.response_tokens = np.concatenate(prompts), np.concatenate(responses)
    must_balance(", ".join(stream.read), sum(stream.read.values()), len(pair_table) + pair_table.dropped)
    pair_table.unread, pair_table.control = dict(stream.unread), dict(stream.control)
    pair_table.drops = dict(sorted(pair_table.drops.items(), key=lambda item: -item[1].count))
    must_train(
        pair_table.splits.get("train", 0), data, {reason: drop.count for reason, drop in pair_table.drops.items()}
    )
    return pair_table


def _chunks(stream: PairStream) -> Iterator[tuple[list[Pair], list[Dropped]]]:
    kept: list[Pair] = []
    left_out: list[Dropped] = []
    for item in stream:
        if isinstance(item, Dropped):
            left_out.append(item)
        else:
            kept.append(item)
        # every row group but the last is full, so a row is found by division
        if len(kept) == GROUP or len(left_out) >= GROUP:
            full = len(kept) == GROUP
            yield kept if full else [], left_out
            kept, left_out = ([] if full else kept), []
    yield kept, left_out


def _table(pairs: list[Pair]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "pair_id": [pair.pair_id for pair in pairs],
        "split": [pair.split for pair in pairs],
        "source": [pair.preference.source for pair in pairs],
        "source_row": [pair.preference.row for pair in pairs],
        "topic": [pair.preference.topic for pair in pairs],
        "prompt": [prompt_text(pair.preference.prompt) for pair in pairs],
        "chosen": [pair.preference.shown("chosen") for pair in pairs],
        "rejected": [pair.preference.shown("rejected") for pair in pairs],
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
        "margin": [None] * len(pairs),
    }
    return pa.table(columns, schema=TEXT)


def _dropped(rows: list[Dropped]) -> pa.Table:
    columns = {"source": "source", "source_row": "row", "reason": "reason", "detail": "detail"}
    filled = {to: [getattr(row, of) for row in rows] for to, of in columns.items()}
    nothing = {name: pa.nulls(len(rows), DROPPED.field(name).type) for name in DROPPED.names if name not in filled}
    return pa.table({**filled, **nothing}, schema=DROPPED)


def _lengths(table: pa.Table, column: str) -> np.ndarray:
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in table[column].chunks]).astype(np.int32)


@lru_cache(maxsize=2)
def _group(path: Path, number: int) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(number)
