"""Preference data as people have it, turned into one kind of record.

Nothing is skipped silently: a row is either a `Preference` or a `Dropped` with its reason. It knows no tokenizer: lengths
and boundaries are `pipeline.pairs.splits`' concern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.formats import FORMATS, Message, RowProblem, detect_format, must_be_unicode
from pipeline.pairs.rows import Row, open_rows


@dataclass(frozen=True)
class Preference:
    """One prompt and two responses, as messages. `row` counts from 0 within `source`; `cut_off` names the sides that were not
    ended by their writer.
    """

    source: str
    row: int
    prompt: list[Message]
    chosen: str
    rejected: str
    topic: str = ""
    cut_off: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Dropped:
    """A row that did not become a pair, and why."""

    source: str
    row: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """One opened source: its name as configured, the format seen in it, a digest of its bytes, and its rows."""

    name: str
    format: str
    digest: str
    rows: Callable[[], Iterator[Row]] = field(repr=False)
    columns: dict[str, str] = field(default_factory=dict)

    def preferences(self) -> Iterator[Preference | Dropped]:
        """Every row in order, converted or dropped with its reason."""
        convert = FORMATS[self.format][1]
        for number, row in enumerate(self.rows()):
            try:
                prompt, chosen, rejected = convert(_renamed(row, self.columns) if self.columns else row)
                _must_be_usable(prompt, chosen, rejected)
                topic = row.get("topic")
                topic = topic if isinstance(topic, str) else ""
                yield Preference(self.name, number, prompt, chosen, rejected, topic, _cut_off(row))
            except RowProblem as problem:
                yield Dropped(self.name, number, problem.reason, problem.detail)


def open_source(name: str, data: DataConfig) -> Source:
    """Open a file, a folder or a Hub data set and detect its format from its first rows.

    Raises DataError if it cannot be read, is empty or its columns fit no format.
    """
    rows, digest = open_rows(name, data)
    first = []
    for row in rows():
        first.append(row)
        if len(first) == 20:
            break
    if not first:
        raise DataError(f"{name} holds no rows")
    columns = {str(wanted): given for wanted, given in data.columns.items()}
    if columns:
        _check_columns(name, first[0], columns)
        first = [_renamed(row, columns, missing_ok=True) for row in first]
    limit = data.max_rows

    def limited() -> Iterator[Row]:
        for number, row in enumerate(rows()):
            if limit is not None and number >= limit:
                return
            yield row

    return Source(name, detect_format(name, first), digest, limited, columns)


def _must_be_usable(prompt: list[Message], chosen: str, rejected: str) -> None:
    must_be_unicode(prompt, {"chosen": chosen, "rejected": rejected})
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise RowProblem("empty_prompt")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise RowProblem("empty_response", name)
    if chosen == rejected:
        raise RowProblem("identical_responses")


def _cut_off(row: Row) -> frozenset[str]:
    """Sides whose column `<side>_cut_off` is true."""
    given = {side: row.get(f"{side}_cut_off") for side in ("chosen", "rejected")}
    for side, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise RowProblem("wrong_type", f"{side}_cut_off is {type(value).__name__}, expected true or false")
    return frozenset(side for side, value in given.items() if value)


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


def _check_columns(name: str, row: Row, columns: dict[str, str]) -> None:
    absent = [given for given in columns.values() if given not in row]
    if absent:
        raise ConfigError(f"data.columns names {', '.join(absent)}, but {name} has: {', '.join(map(str, row))}")
