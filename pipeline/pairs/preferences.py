"""Preference data as people have it, turned into one kind of record.

Nothing is skipped silently: a row is either a `Preference` or a `Dropped` with its reason, and a source counts the rows that
were read apart from what became of them. It knows no tokenizer: lengths and boundaries are `pipeline.pairs.encoding`'s concern.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import CheckError, ConfigError, DataError
from pipeline.pairs.formats import shown
from pipeline.pairs.kinds import Form, Kind, Said, detect, must_serve, other_form, says, unread
from pipeline.pairs.messages import Message, RowProblem, must_alternate, must_be_unicode, tools_of
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.reading.misnamed import printable
from pipeline.pairs.rows import Part, open_parts

_LOOKED_AT = 20


@dataclass(frozen=True)
class Preference:
    """One prompt and two responses, as messages. `row` counts from 0 within `source`; `cut_off` names the sides that were not
    ended by their writer.

    `chosen` and `rejected` are the responses' texts; `calls` holds the tool calls that follow a side's text, `tools` what may be
    called. `judge`: which one made the pair, if its row says so (in `provenance`). `margin`: how much better chosen is, if the
    row says so.

    A response alone stands as chosen, and nothing as rejected: `label` says whether it was called good, `score` how good. A prompt
    alone has neither (`alone`).
    """

    source: str
    row: int
    prompt: list[Message]
    chosen: str
    rejected: str
    topic: str = ""
    cut_off: frozenset[str] = frozenset()
    tools: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    judge: str = ""
    margin: float | None = None
    label: bool | None = None
    score: float | None = None
    alone: bool = False

    @property
    def single(self) -> bool:
        """Whether this is a response alone."""
        return self.label is not None or self.score is not None

    def response(self, side: str) -> Message:
        """A side as the assistant's message."""
        message: Message = {"role": "assistant", "content": getattr(self, side)}
        return message | ({"tool_calls": self.calls[side]} if side in self.calls else {})

    def shown(self, side: str) -> str:
        """A side for people: its text, and its tool calls as JSON."""
        calls = [json.dumps(call, ensure_ascii=False) for call in self.calls.get(side, [])]
        return "\n".join(filter(None, [getattr(self, side), *calls])) if calls else getattr(self, side)


@dataclass(frozen=True)
class Dropped:
    """A row that did not become a pair, and why."""

    source: str
    row: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Reading:
    """How one part of a source is read."""

    part: Part
    form: Form


@dataclass
class Source:
    """One opened source: its name as configured, a digest of its bytes, how each of its parts is read, and what is wanted of it
    (None: what it is).

    After `preferences` or `units` has ended, `read` is the number of rows that were read and `unread` names the columns that
    nothing reads.
    """

    name: str
    digest: str
    readings: list[Reading] = field(repr=False)
    data: DataConfig = field(repr=False)
    wanted: Data | None = "pairs"
    read: int = 0
    unread: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        """The formats of its parts, each named once."""
        return "; ".join(dict.fromkeys(reading.form.title for reading in self.readings))

    @property
    def kinds(self) -> set[Kind]:
        """What kinds of data its parts hold."""
        return {reading.form.kind for reading in self.readings}

    def preferences(self) -> Iterator[Preference | Dropped]:
        """What every row becomes, in order, or why it becomes nothing."""
        for unit in self.units():
            yield from unit

    def units(self) -> Iterator[list[Preference | Dropped]]:
        """The same, all of one row together."""
        self.read, given = 0, 0
        nothing_reads: dict[str, None] = {}
        columns = _column_map(self.data)
        for reading in self.readings:
            for number, row in enumerate(self._rows(reading.part)):
                nothing_reads |= dict.fromkeys(_unread(row, reading.form, columns))
                given += 1
                yield self._unit(reading, number, row, columns)
        self.unread = list(nothing_reads)
        must_balance(self.name, self.read, given)

    def _rows(self, part: Part) -> Iterator[Row]:
        """The part's rows as far as data.max_rows allows, counted as they are read."""
        limit = self.data.max_rows
        for row in islice(part.rows(), None if limit is None else max(0, limit - self.read)):
            self.read += 1
            yield row

    def _unit(self, reading: Reading, number: int, row: Row, columns: dict[str, str]) -> list[Preference | Dropped]:
        try:
            named = _renamed(row, columns) if columns else row
            parts = says(named, reading.form, self.wanted, self.data.lists)
            return [self._part(reading, number, part, row, named) for part in parts]
        except RecursionError:
            return [Dropped(reading.part.name, number, "wrong_type", "nested too deeply")]
        except RowProblem as problem:
            other = other_form(_renamed(row, columns, missing_ok=True), reading.form)
            detail = "; ".join(filter(None, [problem.detail, other]))
            return [Dropped(reading.part.name, number, problem.reason, printable(detail))]

    def _part(
        self, reading: Reading, number: int, part: Said | RowProblem, row: Row, named: Row
    ) -> Preference | Dropped:
        try:
            if isinstance(part, RowProblem):
                raise part
            return self._preference(reading.part.name, number, part, row, named)
        except RowProblem as problem:
            # of a pair, what else its row may be is said too
            if reading.form.kind == "pairs" and not isinstance(part, RowProblem):
                raise
            return Dropped(reading.part.name, number, problem.reason, printable(problem.detail))

    def _preference(self, name: str, number: int, said: Said, row: Row, named: Row) -> Preference:
        given = {"chosen": said.chosen, "rejected": said.rejected or {}}
        sides = {side: message for side, message in given.items() if message}
        topic = row.get("topic")
        found = Preference(
            name,
            number,
            said.prompt,
            given["chosen"].get("content", ""),
            given["rejected"].get("content", ""),
            topic if isinstance(topic, str) else "",
            said.cut_off,
            tools_of(named),
            {side: message["tool_calls"] for side, message in sides.items() if message.get("tool_calls")},
            _judge_of(row),
            said.margin,
            said.label,
            said.score,
            not sides,
        )
        _must_be_usable(found, chat=self.data.template == "chat")
        return found


def open_source(name: str, data: DataConfig, wanted: Data | None = "pairs") -> Source:
    """Open what a name leads to and detect the format of each of its parts from their first rows.

    `wanted`: what its rows are to become; None: what they are. Raises DataError if it cannot be read, is empty, its columns fit
    no format, or its rows cannot become that.
    """
    parts, digest = open_parts(name, data)
    columns = _column_map(data)
    readings = []
    for part in parts:
        first = list(islice(part.rows(), _LOOKED_AT))
        if first and columns:
            _check_columns(part.name, first, columns)
            first = [_renamed(row, columns, missing_ok=True) for row in first]
        if first:
            form = detect(part.name, first, chat=data.template == "chat")
            must_serve(part.name, form, wanted, data.lists)
            readings.append(Reading(part, form))
    if not readings:
        raise DataError(f"{name} holds no rows")
    return Source(name, digest, readings, data, wanted)


def must_balance(name: str, read: int, given: int) -> None:
    """Raise CheckError unless rows in equal rows out and dropped."""
    if read != given:
        raise CheckError(
            f"{name}: {read} rows were read, and {given} are pairs or dropped with a reason: rows were lost"
        )


def _judge_of(row: Row) -> str:
    """The judge that a row names as its maker, as `refscore pairs` writes it."""
    provenance = row.get("provenance")
    judge = provenance.get("judge") if isinstance(provenance, dict) else None
    return " ".join(judge.split())[:200] if isinstance(judge, str) else ""


def _must_be_usable(item: Preference, *, chat: bool) -> None:
    sides = () if item.alone else ("chosen",) if item.single else ("chosen", "rejected")
    others: dict[str, object] = {side: getattr(item, side) for side in sides} | {"topic": item.topic}
    must_be_unicode(item.prompt, {**others, "tool calls": list(item.calls.values()), "tools": item.tools})
    if not any(message["content"].strip() for message in item.prompt if message["role"] != "system"):
        raise RowProblem("empty_prompt")
    for name in sides:
        if not item.shown(name).strip():
            raise RowProblem("empty_response", "response" if item.single else name)
    if len(sides) == 2 and item.shown("chosen") == item.shown("rejected"):
        raise RowProblem("identical_responses")
    if chat:
        must_alternate(item.prompt)


def _column_map(data: DataConfig) -> dict[str, str]:
    return {str(wanted): given for wanted, given in data.columns.items()}


def _unread(row: Row, form: Form, columns: dict[str, str]) -> Iterator[str]:
    # a column that another one stands for is not read either
    replaced = [wanted for wanted, given in columns.items() if wanted in row and given != wanted]
    yield from map(shown, replaced)
    yield from unread(_renamed(row, columns, missing_ok=True) if columns else row, form)


def _renamed(row: Row, columns: dict[str, str], *, missing_ok: bool = False) -> Row:
    renamed = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    for wanted, given in columns.items():
        if given in row:
            renamed[wanted] = row[given]
        elif not missing_ok:
            raise RowProblem("missing_field", given)
    # a column that keeps its own name needs no entry
    for name in ("prompt", "chosen", "rejected", "system"):
        if name not in columns and name in row:
            renamed[name] = row[name]
    return renamed


def _check_columns(name: str, rows: list[Row], columns: dict[str, str]) -> None:
    seen = dict.fromkeys(key for row in rows for key in row)
    absent = [given for given in columns.values() if given not in seen]
    if absent:
        raise ConfigError(f"data.columns names {', '.join(absent)}, but {name} has: {', '.join(map(shown, seen))}")
