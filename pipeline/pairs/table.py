"""Pairs on disk: an experiment's tokenised pairs as parts of Parquet and the numbers of the rows that are kept, so that memory does
not grow with texts; or its responses, if a loss learns from these, or its prompts.

`pipeline.pairs.tokenised` makes it. The files are deleted when the `PairTable` is garbage-collected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts.schemas import PAIRS, RESPONSES
from pipeline.artifacts.tables import list_column
from pipeline.config.losses import Data
from pipeline.pairs.groups import MISMATCHED, PROMPT, RESPONSE
from pipeline.pairs.preferences import Dropped
from pipeline.pairs.splits import SPLITS
from pipeline.pairs.tokenised.part import BLOCK, damaged, schema_of, sides_of

GROUP = 2048


@dataclass
class DropCount:
    """How many rows one reason dropped, and the first of them."""

    count: int
    first: Dropped


class Grown:
    """An array in a file, which grows at its end; what is not looked at takes no memory."""

    def __init__(self, path: Path, dtype: type) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        self._size = 0
        self._values = np.empty(0, self._dtype)

    def __len__(self) -> int:
        return self._size

    def extend(self, values: np.ndarray) -> None:
        """Add values at the end."""
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(values, self._dtype).tobytes())
        self._size += len(values)

    @property
    def values(self) -> np.ndarray:
        """All values so far, to be read; to be asked for again once there are more."""
        if len(self._values) < self._size:
            self._values = np.memmap(self._path, self._dtype, "r", shape=self._size)
        return self._values


@dataclass(frozen=True)
class TablePart:
    """A part of the table: its file, the source's part that its rows are of, the number of its first row there and that of its
    first block of rows in the table.
    """

    path: Path
    source: str
    first_row: int
    first_block: int


class Columns:
    """What is known of each row without a look at its part, in files in `directory`.

    `places`: where it stands, as BLOCK x block + row in the block; `answers`: where its response does, if that is another prompt's;
    `held_out`: whether it is of the split eval; `group_of`: the number of its group; lengths in tokens, of responses each side's.
    """

    def __init__(self, directory: Path) -> None:
        self.places = Grown(directory / "places", np.int64)
        self.answers = Grown(directory / "answers", np.int64)
        self.held_out = Grown(directory / "held_out", np.bool_)
        self.group_of = Grown(directory / "group_of", np.int32)
        self.prompt_tokens = Grown(directory / "prompt_tokens", np.int32)
        self.response_tokens = Grown(directory / "response_tokens", np.int32)


@dataclass
class PairTable:
    """Tokenised pairs in files, rows numbered from 0; a position is 2 x row for chosen, and one more for rejected. Or responses,
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
    wanted: Data = "pairs"
    read: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    cut_off: int = 0
    judges: dict[str, int] = field(default_factory=dict)
    margins: int = 0
    labels: dict[str, list[int]] = field(default_factory=dict)
    unread: dict[str, list[str]] = field(default_factory=dict)
    control: dict[str, int] = field(default_factory=dict)
    drops: dict[str, DropCount] = field(default_factory=dict)
    parts: list[TablePart] = field(default_factory=list, repr=False)
    columns: Columns = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.columns = Columns(Path(self.directory.name))

    def __len__(self) -> int:
        return len(self.columns.prompt_tokens)

    @property
    def sides(self) -> tuple[str, ...]:
        """The responses of a row, by name."""
        return sides_of(self.wanted)

    @property
    def of_pairs(self) -> bool:
        """Whether a row is a pair."""
        return self.wanted == "pairs"

    @property
    def ids(self) -> list[str]:
        """The columns of token ids: of the prompt, and of each side."""
        return ["prompt_ids", *(f"{side}_ids" for side in self.sides)]

    @property
    def schema(self) -> pa.Schema:
        """The table that is made of it."""
        return PAIRS if self.of_pairs else RESPONSES

    @property
    def prompt_tokens(self) -> np.ndarray:
        """Tokens of each row's prompt."""
        return self.columns.prompt_tokens.values

    @property
    def response_tokens(self) -> np.ndarray:
        """Tokens of each row's responses."""
        return self.columns.response_tokens.values

    @property
    def group_of(self) -> np.ndarray:
        """Number of each row's group."""
        return self.columns.group_of.values

    @property
    def bytes(self) -> int:
        """Bytes of the parts."""
        return sum(part.path.stat().st_size for part in self.parts)

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
        for first in range(0, len(self), GROUP):
            yield first, self.rows(first, min(first + GROUP, len(self)), columns)

    def rows(self, first: int, end: int, columns: list[str] | None = None) -> pa.Table:
        """Rows `first` to `end` under their names in pairs.parquet or responses.parquet, all columns or some."""
        schema = pa.schema(
            [one for one in self.schema if not one.name.startswith("ref_") and (columns is None or one.name in columns)]
        )
        places, answers = (grown.values[first:end] for grown in (self.columns.places, self.columns.answers))
        taken = self._taken(places, schema.names)
        if (beside := places != answers).any():
            taken |= self._of_others(first, answers, beside, schema.names)
        held_out = pa.array(self.columns.held_out.values[first:end])
        made = {
            "split": pc.if_else(held_out, *reversed(SPLITS)),
            "kind": pa.array(np.where(beside, MISMATCHED, RESPONSE)),
        }
        if self.wanted == "prompts":
            made["kind"] = pa.repeat(PROMPT, len(places))
        return pa.table({name: taken.get(name, made.get(name)) for name in schema.names}, schema=schema)

    def row(self, number: int) -> dict[str, Any]:
        """One row under its names in pairs.parquet or responses.parquet."""
        row: dict[str, Any] = self.rows(number, number + 1).to_pylist()[0]
        return row

    def source_rows(self) -> np.ndarray:
        """Number in its source of what each row was made of."""
        return np.concatenate([table["source_row"].to_numpy() for _, table in self.groups(["source_row"])])

    def dropped_table(self) -> pa.Table:
        """dropped.parquet's content."""
        return pq.read_table(Path(self.directory.name) / "dropped.parquet")

    def _taken(self, places: np.ndarray, names: list[str]) -> dict[str, pa.Array]:
        """Columns of the rows at `places` as far as their parts know them."""
        of_parts = {"source_row": "row", "pair_id": "row_id", "group_id": "row_id"}
        there = set(schema_of(self.wanted).names)
        asked = tuple(name for name in dict.fromkeys(of_parts.get(name, name) for name in names) if name in there)
        blocks, which = np.unique(places // BLOCK, return_inverse=True)
        parts = np.searchsorted([part.first_block for part in self.parts], blocks, side="right") - 1
        read = [
            _block(self.parts[part].path, int(block) - self.parts[part].first_block, asked)
            for part, block in zip(parts, blocks, strict=True)
        ]
        begins = np.cumsum([0, *map(len, read)])[which]
        table = pa.concat_tables(read).take(pa.array(begins + places % BLOCK)).combine_chunks()
        taken = {name: table[name].combine_chunks() for name in asked}
        of_rows = pa.array(parts[which])
        taken["source"] = pa.array([part.source for part in self.parts], pa.string()).take(of_rows)
        if "row" in taken:
            firsts = pa.array([part.first_row for part in self.parts], pa.int64()).take(of_rows)
            taken["source_row"] = pc.add(taken["row"], firsts)
        if "row_id" in taken:
            ids = pa.array([row_id.hex() for row_id in taken["row_id"].to_pylist()], pa.string())
            taken |= {"pair_id": ids, "group_id": ids}
        return taken

    def _of_others(self, first: int, answers: np.ndarray, beside: np.ndarray, names: list[str]) -> dict[str, pa.Array]:
        """Columns of responses, some of which are another prompt's: as long as may be, and called nothing."""
        others = self._taken(
            answers, [name for name in ("response", "response_ids", "label", "score") if name in names]
        )
        nobody = pa.array(beside)
        for name in {"label", "score"} & others.keys():
            others[name] = pc.if_else(nobody, pa.scalar(None, others[name].type), others[name])
        if "response_ids" in others:
            lengths, ids = self.response_tokens[first : first + len(answers)], others["response_ids"]
            cut = [row.values.to_numpy()[:length] for row, length in zip(ids, lengths, strict=True)]
            others["response_ids"] = list_column(cut, ids.type)
        return {name: others[name] for name in names if name in others and name != "source"}


@lru_cache(maxsize=4)
def _block(path: Path, number: int, columns: tuple[str, ...]) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(number, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None
