"""Preference data as people have it, turned into one kind of record.

Owns the readers (JSONL, JSON, Parquet, folders and Hub data sets), the detection of a source's format and the
conversion of each row. Nothing is skipped silently: a row is either a `Preference` or a `Dropped` with its reason.
It knows no tokenizer: lengths and boundaries are `pipeline.pairs`' concern.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError

Message = dict[str, str]
Row = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Preference:
    """One prompt and two responses, as messages. `row` counts from 0 within `source`."""

    source: str
    row: int
    prompt: list[Message]
    chosen: str
    rejected: str
    topic: str = ""


@dataclass(frozen=True)
class Dropped:
    """A row that did not become a pair, and why."""

    source: str
    row: int
    reason: str
    detail: str = ""


class RowProblem(Exception):
    """A row that cannot become a preference; `reason` is a short fixed word, `detail` what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


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
                yield Preference(self.name, number, prompt, chosen, rejected, topic if isinstance(topic, str) else "")
            except RowProblem as problem:
                yield Dropped(self.name, number, problem.reason, problem.detail)


def open_source(name: str, data: DataConfig) -> Source:
    """Open a file, a folder or a Hub data set and detect its format from its first rows.

    Raises DataError where it cannot be read, is empty or its columns fit no format.
    """
    rows, digest = _open_rows(name, data)
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


def detect_format(name: str, rows: list[Row]) -> str:
    """The first format (in the order of FORMATS) that most of `rows` fit; DataError with the columns seen if none."""
    for title, (fits, _) in FORMATS.items():
        if sum(map(fits, rows)) * 2 > len(rows):
            return title
    seen = ", ".join(sorted({str(key) for row in rows for key in row})) or "none"
    raise DataError(
        f"{name}: columns {seen} fit no known format ({'; '.join(FORMATS)}). "
        "Name them with data.columns, for example --set 'data.columns={prompt: question, chosen: good, rejected: bad}'"
    )


# --- rows of a source


def _open_rows(name: str, data: DataConfig) -> tuple[Callable[[], Iterator[Row]], str]:
    path = Path(name).expanduser()
    if path.is_file():
        readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{name}: files ending in {', '.join(readers)} are read, got {path.suffix!r}")
        return lambda: reader(path), _file_digest(path)
    if path.is_dir():
        return _data_set(str(path), data.split, None)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".jsonl", ".json", ".parquet"):
        return _data_set(name, data.split, data.revision)
    raise DataError(f"{name}: no such file or folder, and not of a Hub data set's form owner/name")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            yield _must_be_object(_decode(path, line, number), f"{path}, line {number}")


def _decode(path: Path, line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        at = number + error.lineno - 1
        raise DataError(f"{path}, line {at}, column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, byte {error.start + 1}: not valid UTF-8") from None
    except RecursionError:
        raise DataError(f"{path}, line {number}: nested too deeply") from None


def _json(path: Path) -> Iterator[Row]:
    content = _decode(path, path.read_bytes(), 1)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON file must hold a list of rows, got {type(content).__name__}")
    for number, row in enumerate(content):
        yield _must_be_object(row, f"{path}, row {number}")


def _must_be_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _data_set(name: str, split: str, revision: str | None) -> tuple[Callable[[], Iterator[Row]], str]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=split, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        # datasets reports a Hub that cannot be reached as a missing file or a connection error
        raise DataError(
            f"{name}: the data set cannot be loaded ({_first_line(error)}). Without a network give data.path a local file "
            "or folder; with one, check the name, your rights (HF_TOKEN) and HF_HUB_OFFLINE"
        ) from None
    except ValueError as error:
        raise DataError(f"{name}: {_first_line(error)} (data.split is {split!r})") from None
    return lambda: iter(table), hashlib.sha256(table._fingerprint.encode()).hexdigest()  # noqa: SLF001  # no public name


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest(name: str) -> str | None:
    """sha256 of a local file's bytes; None for folders and Hub data sets, whose digest needs loading them."""
    path = Path(name).expanduser()
    return _file_digest(path) if path.is_file() and os.access(path, os.R_OK) else None


# --- formats: does a row fit, and what does it say


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_hh(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return "prompt" not in row and all(isinstance(side, str) and "\n\nAssistant:" in side for side in sides)


def _from_hh(row: Row) -> tuple[list[Message], str, str]:
    return _branching(_hh_messages(row, "chosen"), _hh_messages(row, "rejected"))


def _hh_messages(row: Row, column: str) -> list[Message]:
    text = _string(row, column)
    parts = re.split(r"\n\n(Human|Assistant):", text)
    messages = [{"role": "system", "content": parts[0].strip()}] if parts[0].strip() else []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": ROLES["human" if speaker == "Human" else "assistant"], "content": content.strip()})
    return messages


def _is_sharegpt(row: Row) -> bool:
    return _is_messages(row.get("conversations")) and "chosen" in row and "rejected" in row


def _from_sharegpt(row: Row) -> tuple[list[Message], str, str]:
    prompt = _messages(row["conversations"], "conversations")
    if isinstance(row.get("system"), str) and row["system"].strip():
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    return prompt, _response(row, "chosen"), _response(row, "rejected")


def _is_ultrafeedback(row: Row) -> bool:
    return (
        isinstance(row.get("prompt"), str)
        and _starts_with_prompt(row, "chosen")
        and _starts_with_prompt(row, "rejected")
    )


def _starts_with_prompt(row: Row, column: str) -> bool:
    # UltraFeedback-binarized repeats the prompt inside both message lists; TRL's explicit format does not
    messages = row.get(column)
    return _is_messages(messages) and len(messages) > 1  # type: ignore[arg-type]  # _is_messages says it is a list


def _is_explicit_messages(row: Row) -> bool:
    return _is_messages(row.get("prompt")) and "chosen" in row and "rejected" in row


def _from_explicit_messages(row: Row) -> tuple[list[Message], str, str]:
    return _with_system(row, _messages(row["prompt"], "prompt")), _response(row, "chosen"), _response(row, "rejected")


def _is_explicit_strings(row: Row) -> bool:
    return "prompt" in row and "chosen" in row and "rejected" in row


def _from_explicit_strings(row: Row) -> tuple[list[Message], str, str]:
    prompt = _with_system(row, [{"role": "user", "content": _string(row, "prompt")}])
    return prompt, _response(row, "chosen"), _response(row, "rejected")


def _is_implicit_messages(row: Row) -> bool:
    return "prompt" not in row and _is_messages(row.get("chosen")) and _is_messages(row.get("rejected"))


def _from_implicit_messages(row: Row) -> tuple[list[Message], str, str]:
    prompt, chosen, rejected = _branching(_column_messages(row, "chosen"), _column_messages(row, "rejected"))
    return _with_system(row, prompt), chosen, rejected


def _is_implicit_strings(row: Row) -> bool:
    return "prompt" not in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)


def _from_implicit_strings(row: Row) -> tuple[list[Message], str, str]:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    # the prompt ends at the last white space before the texts part, as a word must not be cut in two
    common = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071  # characters are meant
    if common < min(len(chosen), len(rejected)):
        while common and not chosen[common - 1].isspace():
            common -= 1
    prompt = chosen[:common]
    if not prompt.strip():
        raise RowProblem("no_common_prompt", "chosen and rejected share no beginning")
    return _with_system(row, [{"role": "user", "content": prompt}]), chosen[common:], rejected[common:]


FORMATS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], tuple[list[Message], str, str]]]] = {
    "sharegpt": (_is_sharegpt, _from_sharegpt),
    "HH-RLHF dialogue strings": (_is_hh, _from_hh),
    "UltraFeedback-binarized": (_is_ultrafeedback, _from_implicit_messages),
    "TRL explicit, messages": (_is_explicit_messages, _from_explicit_messages),
    "TRL explicit, strings": (_is_explicit_strings, _from_explicit_strings),
    "TRL implicit, messages": (_is_implicit_messages, _from_implicit_messages),
    "TRL implicit, strings": (_is_implicit_strings, _from_implicit_strings),
}


def _branching(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        raise RowProblem(
            "diverges_before_last_turn",
            f"after {shared} common messages chosen goes on for {len(chosen) - shared}, rejected for {len(rejected) - shared}",
        )
    for message in (chosen[-1], rejected[-1]):
        if message["role"] != "assistant":
            raise RowProblem("last_turn_not_assistant", f"the last message is by {message['role']!r}")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _response(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    messages = _messages(value, column)
    if len(messages) != 1:
        raise RowProblem("response_of_many_messages", f"{column} holds {len(messages)} messages, one is wanted")
    if messages[0]["role"] != "assistant":
        raise RowProblem("last_turn_not_assistant", f"{column} is by {messages[0]['role']!r}")
    return messages[0]["content"]


def _column_messages(row: Row, column: str) -> list[Message]:
    if row.get(column) is None:
        raise RowProblem("missing_field", column)
    return _messages(row[column], column)


def _messages(value: object, column: str) -> list[Message]:
    if value is None:
        raise RowProblem("missing_field", column)
    if not isinstance(value, list) or not value:
        raise RowProblem("wrong_type", f"{column} is {_kind(value)}, a list of messages is wanted")
    messages = []
    for item in value:
        if not isinstance(item, dict):
            raise RowProblem("wrong_type", f"a message in {column} is {_kind(item)}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RowProblem("unknown_role", f"{role!r} in {column}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RowProblem("wrong_type", f"a message's content in {column} is {_kind(content)}, text is wanted")
        messages.append({"role": ROLES[role.lower()], "content": content})
    return messages


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not any(message["role"] == "system" for message in prompt):
        return [{"role": "system", "content": system}, *prompt]
    return prompt


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowProblem("missing_field", column)
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"{column} is {_kind(value)}, text is wanted")
    return value


def _must_be_usable(prompt: list[Message], chosen: str, rejected: str) -> None:
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        raise RowProblem("empty_prompt")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise RowProblem("empty_response", name)
    if chosen == rejected:
        raise RowProblem("identical_responses")


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


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
