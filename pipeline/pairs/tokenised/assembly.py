"""Parts put together: which of their rows are kept, in which split, and what stands beside them.

Rows are looked at in the order of the data, a window of them at a time, while processes make the parts behind them.
"""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts.durable import explaining_disk, scratch_place
from pipeline.artifacts.schemas import DROPPED
from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.hardware import processors
from pipeline.pairs.encoding import Encoder
from pipeline.pairs.groups import Neighbours, Told
from pipeline.pairs.preferences import Dropped, Reading, Source
from pipeline.pairs.reading.ranges import RANGE_BYTES, Everything, Range
from pipeline.pairs.sources import Sources
from pipeline.pairs.splits import KEPT, SPLITS, Selection, must_train
from pipeline.pairs.table import DropCount, PairTable, TablePart
from pipeline.pairs.tokenised.making import How, Made, Maker
from pipeline.pairs.tokenised.part import BLOCK, Piece, damaged, figures_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# rows of the sources that are looked at between two windows
WINDOW = 2_048
# beside the reasons of `Selection`: a row was dropped before it was looked up
_BEFORE = -1


@dataclass(frozen=True)
class _Asked:
    """A range, what its source is for, and whether it is the first of its file."""

    role: str
    source: Source
    reading: Reading
    range: Range | Everything
    first: bool


class _Row(NamedTuple):
    """A response that waits for one to another prompt, or stands beside one."""

    place: int
    prompt_tokens: int
    response_tokens: int
    key: bytes


class Assembly:
    """Reads all sources into `table`, for a loss that learns from `wanted`; `mismatched`: each with another prompt's response.

    Raises ConfigError if the tokenizer cannot do what is asked, or if there is no such source.
    """

    def __init__(
        self,
        data: DataConfig,
        wanted: Data,
        how: How,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mismatched: bool = False,
    ) -> None:
        self._data, self._how, self._tokenizer, self._wanted = data, how, tokenizer, wanted
        self._limit = Encoder(data, tokenizer, how.positions).limit
        self._sources, self._selection = Sources(data, wanted), Selection(data, wanted)
        self._neighbours = Neighbours[_Row]() if mismatched else None
        directory = tempfile.TemporaryDirectory(prefix="pairs-", dir=scratch_place())
        self.table = PairTable(self._sources.formats, self._sources.digests, directory, wanted)
        self._directory = Path(directory.name)
        self._asked: deque[_Asked] = deque()
        self._next_row = self._next_block = self._groups = self._given = self._whole = 0

    def windows(self) -> Iterator[tuple[int, int, float]]:
        """The first row and the end of each window of the table, and the share of the sources' bytes that are read by then.

        Raises DataError if a source cannot be read or nothing is left to train on, CheckError if rows were lost on the way,
        ConfigError for a setting that nothing has read.
        """
        asked = [
            _Asked(role, source, reading, one, not number)
            for role, source in self._sources.opened
            for reading in source.readings
            for number, one in enumerate(reading.part.ranges())
        ]
        size = sum(one.range.bytes for one in asked)
        workers = self._data.workers or max(1, min(len(processors()), size // RANGE_BYTES))
        maker = Maker(self._how, self._tokenizer, self._directory, workers)
        shown = looked_at = 0
        done = 0.0
        with ExitStack() as stack:
            stack.enter_context(explaining_disk(self._directory / "pairs"))
            keys = stack.enter_context((self._directory / "keys").open("wb"))
            dropped = stack.enter_context(
                pq.ParquetWriter(self._directory / "dropped.parquet", DROPPED, compression="zstd")
            )
            for made in maker.parts(self._pieces(asked)):
                for rows, read in self._add(made, keys, dropped):
                    looked_at, done = looked_at + rows, done + read
                    if looked_at >= WINDOW:
                        keys.flush()
                        yield shown, len(self.table), done / (size or 1)
                        shown, looked_at = len(self.table), 0
            self._end()
        yield shown, len(self.table), 1.0

    def keys(self, first: int, end: int) -> pa.FixedSizeBinaryArray:
        """The keys of the sequences of rows `first` to `end`, chosen then rejected of each pair; they stay on the disk."""
        sides = len(self.table.sides)
        if first == end or not sides:
            return pa.array([], pa.binary(32))
        count, offset = sides * (end - first), 32 * sides * first
        mapped = np.memmap(self._directory / "keys", np.uint8, "r", offset=offset, shape=32 * count)
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(mapped)])

    def _pieces(self, asked: list[_Asked]) -> Iterator[Piece]:
        for one in asked:
            left = None if self._data.max_rows is None else self._data.max_rows - one.source.read
            if left != 0:
                self._asked.append(one)
                part, data = one.reading.part, self._data.model_copy(update={"max_rows": left})
                yield Piece(part.name, part.digest, one.range, one.reading.form, data, self._wanted)

    def _add(self, made: Made, keys: BinaryIO, dropped: pq.ParquetWriter) -> Iterator[tuple[int, float]]:
        """Take the next part's rows, some at a time: how many, and how many bytes of the sources they are."""
        asked = self._asked.popleft()
        figures, said = figures_of(made.part, self._wanted)
        first_row = 0 if asked.first else self._next_row
        part = TablePart(made.part, made.piece.name, first_row, self._next_block)
        self.table.parts.append(part)
        self._next_row = first_row + said["read"]
        self._next_block += -(-len(figures) // BLOCK)
        rows = _Rows.of(figures, self.table.sides, made.keys)
        for begin, end in pairwise(rows.edges()):
            self._take(part, begin, rows.slice(begin, end), asked.role, keys, dropped)
            yield end - begin, made.piece.range.bytes * (end - begin) / len(figures)
        asked.source.read += said["read"]
        asked.source.unread = list(dict.fromkeys([*asked.source.unread, *said["unread"]]))
        for name, count in said["control"].items():
            self.table.control[name] = self.table.control.get(name, 0) + count
        self._given += len(np.unique(rows.row))
        self._whole += said["whole"]

    def _take(
        self, part: TablePart, offset: int, rows: _Rows, role: str, keys: BinaryIO, dropped: pq.ParquetWriter
    ) -> None:
        """Take rows that begin at `offset` of a part: leave out what was read before, and note the others."""
        heads, unit = np.flatnonzero(rows.begins), np.cumsum(rows.begins) - 1
        whole = heads[~rows.out[heads]]
        reasons, held_out = np.full(len(heads), _BEFORE), np.zeros(len(heads), bool)
        reasons[unit[whole]], held_out[unit[whole]] = self._selection.choose(
            role, rows.prompts[whole], rows.row_ids[whole]
        )
        self._leave_out(part, rows, heads[reasons != KEPT], reasons[reasons != KEPT], dropped)
        kept = np.flatnonzero(reasons[unit] == KEPT)
        of_kept = held_out[unit[kept]]
        self._count(rows, kept, of_kept)
        places = part.first_block * BLOCK + offset + kept
        if self._neighbours:
            self._put_beside_others(self._neighbours, part, rows, kept, places, of_kept, keys)
            return
        columns = self.table.columns
        columns.places.extend(places)
        columns.answers.extend(places)
        columns.held_out.extend(of_kept)
        columns.prompt_tokens.extend(rows.prompt_tokens[kept])
        columns.response_tokens.extend(rows.response_tokens[kept].ravel())
        keys.write(rows.keys[kept].tobytes())
        if not self.table.of_pairs:
            columns.group_of.extend(self._groups - 1 + np.cumsum(rows.begins[kept]))
        self._groups += int(rows.begins[kept].sum())

    def _put_beside_others(
        self,
        neighbours: Neighbours[_Row],
        part: TablePart,
        rows: _Rows,
        kept: np.ndarray,
        places: np.ndarray,
        held_out: np.ndarray,
        keys: BinaryIO,
    ) -> None:
        """Note responses that have found one to another prompt, each with that behind it."""
        found: list[tuple[Told[_Row], Told[_Row]]] = []
        for at, place, held in zip(kept.tolist(), places.tolist(), held_out.tolist(), strict=True):
            tokens = int(rows.prompt_tokens[at]), int(rows.response_tokens[at, 0])
            row, label = _Row(place, *tokens, rows.keys[at].tobytes()), rows.labels[at]
            found += neighbours.add(
                Told(
                    rows.prompts[at].tobytes(),
                    SPLITS[held],
                    None if label < 0 else bool(label),
                    part.source,
                    part.first_row + int(rows.row[at]),
                    row,
                )
            )
        columns, first = self.table.columns, len(self.table)
        ones, others = ([told[side].item for told in found] for side in (0, 1))
        prompts = np.array([one.prompt_tokens for one in ones], np.int32)
        lengths = np.array(
            [(one.response_tokens, other.response_tokens) for one, other in zip(ones, others, strict=True)]
        )
        lengths = lengths.reshape(-1, 2)
        lengths[:, 1] = np.minimum(lengths[:, 1], self._limit - prompts)
        columns.places.extend(np.repeat([one.place for one in ones], 2))
        columns.answers.extend(
            np.array([(one.place, other.place) for one, other in zip(ones, others, strict=True)]).ravel()
        )
        columns.held_out.extend(np.repeat([one.split == "eval" for one, _ in found], 2))
        columns.prompt_tokens.extend(np.repeat(prompts, 2))
        columns.response_tokens.extend(lengths.ravel())
        columns.group_of.extend(np.repeat(self._groups + np.arange(len(found)), 2))
        self._groups += len(found)
        beside = self._keys_beside(first)
        keys.write(b"".join(key for one, other in zip(ones, beside, strict=True) for key in (one.key, other)))

    def _keys_beside(self, first: int) -> list[bytes]:
        """Keys of the mismatched rows from row `first` on, which no part has."""
        found: list[bytes] = []
        for begin in range(first, len(self.table), 2 * BLOCK):
            table = self.table.rows(begin, min(begin + 2 * BLOCK, len(self.table)), self.table.ids)
            found += self._how.keys(table.take(pa.array(range(1, len(table), 2)))).to_pylist()
        return found

    def _leave_out(
        self, part: TablePart, rows: _Rows, heads: np.ndarray, reasons: np.ndarray, dropped: pq.ParquetWriter
    ) -> None:
        """Note rows that are not kept: those that were dropped before, and those that were read before."""
        said = rows.words.take(pa.array(heads)).to_pylist()
        left_out = [
            Dropped(part.source, part.first_row + row, words["reason"], words["detail"])
            if reason == _BEFORE
            else self._selection.dropped(int(reason), row_id.tobytes(), part.source, part.first_row + row)
            for words, reason, row, row_id in zip(
                said, reasons, rows.row[heads].tolist(), rows.row_ids[heads], strict=True
            )
        ]
        columns = {"source": "source", "source_row": "row", "reason": "reason", "detail": "detail"}
        filled = {to: [getattr(row, of) for row in left_out] for to, of in columns.items()}
        nothing = {
            name: pa.nulls(len(left_out), DROPPED.field(name).type) for name in DROPPED.names if name not in filled
        }
        dropped.write_table(pa.table({**filled, **nothing}, schema=DROPPED))
        for row in left_out:
            self.table.drops.setdefault(row.reason, DropCount(0, row)).count += 1

    def _count(self, rows: _Rows, kept: np.ndarray, held_out: np.ndarray) -> None:
        """Note what the figures of the table say of rows that are kept."""
        table, begins = self.table, rows.begins[kept]
        for split, of_split in zip(SPLITS, (~held_out, held_out), strict=True):
            if count := int((begins & of_split).sum()):
                table.splits[split] = table.splits.get(split, 0) + count
            good, bad = (int((rows.labels[kept] == label)[of_split].sum()) for label in (1, 0))
            if good or bad:
                before = table.labels.get(split, [0, 0])
                table.labels[split] = [before[0] + good, before[1] + bad]
        judges = rows.words["judge"].take(pa.array(kept[begins & ~held_out]))
        for judge in pc.value_counts(judges).to_pylist():
            table.judges[judge["values"]] = table.judges.get(judge["values"], 0) + judge["counts"]
        table.cut_off += int(rows.cut_off[kept].sum())
        table.margins += int(rows.margins[kept].sum())

    def _end(self) -> None:
        table, sources = self.table, self._sources
        sources.end(self._given)
        if self._neighbours:
            self._neighbours.end()
        table.read, table.unread = sum(sources.read.values()), dict(sources.unread)
        table.drops = dict(sorted(table.drops.items(), key=lambda item: -item[1].count))
        reasons = {reason: drop.count for reason, drop in table.drops.items()}
        unit = {"pairs": "pair", "prompts": "prompt"}.get(self._wanted, "response")
        must_train(table.splits.get("train", 0), self._data, reasons, unit)
        log.debug("the prompt of %d rows was tokenised again with each response", self._whole)


@dataclass(frozen=True)
class _Rows:
    """Figures of a part's rows as arrays [rows], `response_tokens` [rows, sides], digests and keys as bytes [rows, bytes].

    `out`: dropped before; `labels`: 1 good, 0 bad, -1 neither; `margins`: whether there is one; `words`: reason, detail and judge.
    """

    begins: np.ndarray
    out: np.ndarray
    row: np.ndarray
    prompts: np.ndarray
    row_ids: np.ndarray
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    cut_off: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    keys: np.ndarray
    words: pa.Table

    @classmethod
    def of(cls, figures: pa.Table, sides: Sequence[str], keys: Path | None) -> _Rows:
        """All rows of a part."""

        def numbers(name: str) -> np.ndarray:
            filled: np.ndarray = pc.fill_null(figures[name], 0).to_numpy()
            return filled

        nothing = np.zeros(len(figures), bool)
        has_labels, has_margins = ("label" in figures.column_names), ("margin" in figures.column_names)
        return cls(
            begins=figures["begins"].to_numpy(),
            out=figures["reason"].is_valid().to_numpy(),
            row=figures["row"].to_numpy(),
            prompts=bytes_of(figures["prompt_digest"]),
            row_ids=bytes_of(figures["row_id"]),
            prompt_tokens=numbers("prompt_tokens"),
            response_tokens=np.stack([numbers(f"{side}_tokens") for side in sides], 1)
            if sides
            else np.zeros((len(figures), 0)),
            cut_off=numbers("cut_off"),
            labels=pc.fill_null(figures["label"].cast(pa.int8()), -1).to_numpy() if has_labels else nothing - 1,
            margins=figures["margin"].is_valid().to_numpy() if has_margins else nothing,
            keys=_keys_of(keys, len(figures), len(sides)),
            words=figures.select(["reason", "detail", "judge"]),
        )

    def slice(self, begin: int, end: int) -> _Rows:
        """Some of the rows."""
        return _Rows(**{name: values[begin:end] for name, values in vars(self).items()})

    def edges(self) -> list[int]:
        """Where rows may be parted so that about a window is taken at a time and no group is torn."""
        heads = np.flatnonzero(self.begins)
        at = np.searchsorted(heads, np.arange(WINDOW, len(self.begins), WINDOW))
        return sorted({0, *heads[at[at < len(heads)]].tolist(), len(self.begins)})


def bytes_of(column: pa.ChunkedArray | pa.FixedSizeBinaryArray) -> np.ndarray:
    """A column of digests as bytes [rows, bytes]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width = array.type.byte_width
    if not len(array):
        return np.zeros((0, width), np.uint8)
    return np.frombuffer(array.buffers()[1], np.uint8)[width * array.offset :][: width * len(array)].reshape(-1, width)


def _keys_of(path: Path | None, rows: int, sides: int) -> np.ndarray:
    """Keys of each row, one after the other [rows, 32 x sides]."""
    if path is None:
        return np.zeros((rows, 0), np.uint8)
    try:
        keys = pq.read_table(path, page_checksum_verification=True, use_threads=False)["key"]
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    if len(keys) != rows * sides:
        raise damaged(path, ValueError(f"{len(keys)} keys of {rows} rows"))
    return bytes_of(keys).reshape(rows, 32 * sides)
