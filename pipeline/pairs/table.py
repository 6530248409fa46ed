"""Pairs on disk: an experiment's tokenised pairs as a Parquet file of row groups, so that memory does not grow with rows; or its
responses, if a loss learns from these, or its prompts.

Owns the working file between reading the data and writing pairs.parquet or responses.parquet: the same columns, without scores.
What stays in memory is a few numbers per row. The file is deleted when its `PairTable` is garbage-collected.
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
from pipeline.artifacts.schemas import DROPPED, PAIRS, RESPONSES
from pipeline.config.experiment import DataConfig
from pipeline.pairs.groups import MISMATCHED, PROMPT, ResponseRow, ResponseStream
from pipeline.pairs.preferences import Dropped, must_balance
from pipeline.pairs.splits import Pair, PairStream, must_train, prompt_text

GROUP = 2048
_PAIR, _RESPONSE = ("chosen", "rejected"), ("response",)


@dataclass
class DropCount:
    """How many rows one reason dropped, and the first of them."""

    count: int
    first: Dropped


@dataclass
class PairTable:
    """Tokenised pairs in a file, rows numbered from 0; a position is 2 x row for chosen, and one more for rejected. Or responses,
    of which a row has one: `sides` are its names, and a position is row x sides + side. Or prompts alone, with no side.

    `prompt_tokens` [rows] and `response_tokens` [sides x rows] are lengths; `read` rows of the sources; `splits` counts pairs, or
    groups of responses; `cut_off` responses without an end token as they were not ended, `judges` training pairs by the judge that
    made them ("": their rows do not say), `control` rows that name a control token, `margins` pairs that say how much better
    chosen is; `labels`, of each split, responses that were called good, and bad; `unread` are columns that nothing reads, of each
    source. `group_of` [rows] numbers the groups of responses; of pairs it is empty.
    """

    formats: dict[str, str]
    digests: dict[str, str]
    directory: tempfile.TemporaryDirectory[str] = field(repr=False)
    sides: tuple[str, ...] = _PAIR
    read: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    cut_off: int = 0
    judges: dict[str, int] = field(default_factory=dict)
    margins: int = 0
    labels: dict[str, list[int]] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)
    control: dict[str, int] = field(default_factory=dict)
    drops: dict[str, DropCount] = field(default_factory=dict)
    prompt_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    response_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)
    group_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def of_pairs(self) -> bool:
        """Whether a row is a pair."""
        return self.sides == _PAIR

    @property
    def ids(self) -> list[str]:
        """The columns of token ids: of the prompt, and of each side."""
        return ["prompt_ids", *(f"{side}_ids" for side in self.sides)]

    @property
    def schema(self) -> pa.Schema:
        """The table that is made of it."""
        return PAIRS if self.of_pairs else RESPONSES

    @property
    def dropped(self) -> int:
        """What became no pair, and no response."""
        return sum(drop.count for drop in self.drops.values())

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """Tokens of the sequences at `positions`, prompt included."""
        lengths_of_positions: np.ndarray = (
            self.prompt_tokens[positions // len(self.sides)] + self.response_tokens[positions]
        )
        return lengths_of_positions

    @property
    def sequences_longest(self) -> np.ndarray:
        """Tokens of the longest sequence of each pair or group, prompt included."""
        if not self.sides:
            return self.prompt_tokens.astype(np.int64)
        longest: np.ndarray = self.prompt_tokens[self._begins].astype(np.int64) + np.maximum.reduceat(
            self.response_tokens, self._begins * len(self.sides)
        )
        return longest

    @property
    def tree_tokens(self) -> np.ndarray:
        """Tokens that each pair or group is read as: the prompt once, and all responses but their last, which predict nothing."""
        if not self.sides:
            return self.prompt_tokens.astype(np.int64)
        begins = self._begins * len(self.sides)
        sums = np.add.reduceat(self.response_tokens.astype(np.int64) - 1, begins)
        trees: np.ndarray = self.prompt_tokens[self._begins].astype(np.int64) + sums
        return trees

    @property
    def _begins(self) -> np.ndarray:
        """The first row of each pair or group."""
        rows = np.arange(len(self))
        begins: np.ndarray = rows if self.of_pairs else np.unique(self.group_of, return_index=True)[1]
        return begins

    def groups(self, columns: list[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """Row groups in order, each with the number of its first row."""
        with pq.ParquetFile(self._pairs) as file:
            first = 0
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=columns)
                yield first, table
                first += len(table)

    def row(self, number: int) -> dict[str, Any]:
        """One row under its names in pairs.parquet or responses.parquet."""
        table: pa.Table = _group(self._pairs, number // GROUP)
        pair: dict[str, Any] = table.slice(number % GROUP, 1).to_pylist()[0]
        return pair

    def source_rows(self) -> np.ndarray:
        """Number in its source of what each row was made of."""
        return np.concatenate([table["source_row"].to_numpy() for _, table in self.groups(["source_row"])])

    def dropped_table(self) -> pa.Table:
        """dropped.parquet's content."""
        return pq.read_table(Path(self.directory.name) / "dropped.parquet")

    @property
    def _pairs(self) -> Path:
        return Path(self.directory.name) / "pairs.parquet"


def write_pairs(
    data: DataConfig, stream: PairStream | ResponseStream, on_group: Callable[[pa.Table], None]
) -> PairTable:
    """Read the stream to its end into a new table; `on_group` sees every row group as it is written.

    Raises DataError if nothing is left to train on, and what the stream raises.
    """
    directory = tempfile.TemporaryDirectory(prefix="pairs-", dir=scratch_place())
    sides = _PAIR if isinstance(stream, PairStream) else () if stream.wanted == "prompts" else _RESPONSE
    found = PairTable(stream.formats, stream.digests, directory, sides)
    schema = pa.schema([column for column in found.schema if not column.name.startswith("ref_")])
    prompts, responses, begun = [found.prompt_tokens], [found.response_tokens], [np.zeros(0, bool)]
    last = ""
    with (
        explaining_disk(Path(directory.name)),
        pq.ParquetWriter(Path(directory.name) / "pairs.parquet", schema, compression="zstd") as rows,
        pq.ParquetWriter(Path(directory.name) / "dropped.parquet", DROPPED, compression="zstd") as dropped,
    ):
        for kept, left_out in _chunks(stream):
            dropped.write_table(_dropped(left_out))
            for row in left_out:
                found.drops.setdefault(row.reason, DropCount(0, row)).count += 1
            if not kept:
                continue
            table = _table(kept, schema)
            rows.write_table(table, row_group_size=GROUP)
            on_group(table)
            names = [_name_of(item) for item in kept]
            begins = [name != before for name, before in zip(names, [last, *names], strict=False)]
            for item, begin in zip(kept, begins, strict=True):
                _count(found, item, begins=begin)
            last = names[-1]
            begun.append(np.array(begins))
            prompts.append(_lengths(table, "prompt_ids"))
            responses.append(np.array([_lengths(table, name) for name in found.ids[1:]], np.int32).ravel("F"))
    found.prompt_tokens, found.response_tokens = np.concatenate(prompts), np.concatenate(responses)
    if not found.of_pairs:
        found.group_of = np.cumsum(np.concatenate(begun), dtype=np.int32) - 1
    found.read = sum(stream.read.values())
    must_balance(", ".join(stream.read), stream.given, len(found) + found.dropped)
    found.unread, found.control = dict(stream.unread), dict(stream.control)
    found.drops = dict(sorted(found.drops.items(), key=lambda item: -item[1].count))
    reasons = {reason: drop.count for reason, drop in found.drops.items()}
    must_train(
        found.splits.get("train", 0), data, reasons, "pair" if sides == _PAIR else "response" if sides else "prompt"
    )
    return found


def _name_of(item: Pair | ResponseRow) -> str:
    return item.pair_id if isinstance(item, Pair) else item.group_id


def _count(found: PairTable, item: Pair | ResponseRow, *, begins: bool) -> None:
    """Note what the figures of a table say of a row; `begins`: a pair or a group."""
    preference = item.preference
    if begins:
        found.splits[item.split] = found.splits.get(item.split, 0) + 1
    if begins and item.split == "train":
        found.judges[preference.judge] = found.judges.get(preference.judge, 0) + 1
    if isinstance(item, Pair) or item.kind != MISMATCHED:
        found.cut_off += len(preference.cut_off)
    found.margins += preference.margin is not None
    if preference.label is not None:
        found.labels.setdefault(item.split, [0, 0])[0 if preference.label else 1] += 1


def _chunks(stream: PairStream | ResponseStream) -> Iterator[tuple[list[Pair | ResponseRow], list[Dropped]]]:
    kept: list[Pair | ResponseRow] = []
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


def _table(items: list[Pair | ResponseRow], schema: pa.Schema) -> pa.Table:
    preferences = [item.preference for item in items]
    columns: dict[str, list[Any]] = {
        "split": [item.split for item in items],
        "source": [preference.source for preference in preferences],
        "source_row": [preference.row for preference in preferences],
        "topic": [preference.topic for preference in preferences],
        "prompt": [prompt_text(preference.prompt) for preference in preferences],
        "prompt_ids": [item.prompt_ids for item in items],
    }
    if pairs := [item for item in items if isinstance(item, Pair)]:
        columns |= {
            "pair_id": [pair.pair_id for pair in pairs],
            "chosen": [pair.preference.shown("chosen") for pair in pairs],
            "rejected": [pair.preference.shown("rejected") for pair in pairs],
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
            "margin": [pair.preference.margin for pair in pairs],
        }
    if responses := [item for item in items if isinstance(item, ResponseRow)]:
        columns |= {
            "group_id": [row.group_id for row in responses],
            "response": [None if row.kind == PROMPT else row.preference.shown("chosen") for row in responses],
            "kind": [row.kind for row in responses],
            "label": [row.preference.label for row in responses],
            "score": [row.preference.score for row in responses],
            "response_ids": [None if row.kind == PROMPT else row.response_ids for row in responses],
        }
    return pa.table(columns, schema=schema)


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
