"""The forms that preference data comes in: does a row fit, and what does it say.

FORMATS is asked in order. A conversion gives the prompt's messages and the two responses, or raises RowProblem.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile

from pipeline.errors import DataError
from pipeline.pairs.rows import Row

Message = dict[str, str]
Converted = tuple[list[Message], str, str]

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


class RowProblem(Exception):
    """A row that cannot become a preference; `reason` is a short fixed word, `detail` what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


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


# --- one pair of functions a form


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_hh(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return "prompt" not in row and all(isinstance(side, str) and "\n\nAssistant:" in side for side in sides)


def _from_hh(row: Row) -> Converted:
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


def _from_sharegpt(row: Row) -> Converted:
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
    return isinstance(messages, list) and len(messages) > 1 and _is_messages(messages)


def _is_explicit_messages(row: Row) -> bool:
    return _is_messages(row.get("prompt")) and "chosen" in row and "rejected" in row


def _from_explicit_messages(row: Row) -> Converted:
    return _with_system(row, _messages(row["prompt"], "prompt")), _response(row, "chosen"), _response(row, "rejected")


def _is_explicit_strings(row: Row) -> bool:
    return "prompt" in row and "chosen" in row and "rejected" in row


def _from_explicit_strings(row: Row) -> Converted:
    prompt = _with_system(row, [{"role": "user", "content": _string(row, "prompt")}])
    return prompt, _response(row, "chosen"), _response(row, "rejected")


def _is_implicit_messages(row: Row) -> bool:
    return "prompt" not in row and _is_messages(row.get("chosen")) and _is_messages(row.get("rejected"))


def _from_implicit_messages(row: Row) -> Converted:
    prompt, chosen, rejected = _branching(_column_messages(row, "chosen"), _column_messages(row, "rejected"))
    return _with_system(row, prompt), chosen, rejected


def _is_implicit_strings(row: Row) -> bool:
    return "prompt" not in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)


def _from_implicit_strings(row: Row) -> Converted:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    # the prompt ends at the last white space before the texts part, as a word must not be cut in two
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = sum(1 for _ in alike)
    if common < min(len(chosen), len(rejected)):
        while common and not chosen[common - 1].isspace():
            common -= 1
    prompt = chosen[:common]
    if not prompt.strip():
        raise RowProblem("no_common_prompt", "chosen and rejected share no beginning")
    return _with_system(row, [{"role": "user", "content": prompt}]), chosen[common:], rejected[common:]


FORMATS: dict[str, tuple[Callable[[Row], bool], Callable[[Row], Converted]]] = {
    "sharegpt": (_is_sharegpt, _from_sharegpt),
    "HH-RLHF dialogue strings": (_is_hh, _from_hh),
    "UltraFeedback-binarized": (_is_ultrafeedback, _from_implicit_messages),
    "TRL explicit, messages": (_is_explicit_messages, _from_explicit_messages),
    "TRL explicit, strings": (_is_explicit_strings, _from_explicit_strings),
    "TRL implicit, messages": (_is_implicit_messages, _from_implicit_messages),
    "TRL implicit, strings": (_is_implicit_strings, _from_implicit_strings),
}


def one_response(row: Row) -> tuple[list[Message], str]:
    """The prompt's messages and the one response of a row with the columns `prompt` and `response`; else RowProblem."""
    prompt = (
        [{"role": "user", "content": row["prompt"]}]
        if isinstance(row.get("prompt"), str)
        else _column_messages(row, "prompt")
    )
    response = _response(row, "response")
    if not response.strip():
        raise RowProblem("empty_response")
    prompt = _with_system(row, prompt)
    must_be_unicode(prompt, {"response": response})
    return prompt, response


def must_be_unicode(prompt: list[Message], responses: dict[str, str]) -> None:
    """Raise RowProblem for half a character (a lone surrogate), which JSON can write and no tokenizer reads."""
    texts = [*((message["role"], message["content"]) for message in prompt), *responses.items()]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowProblem("half_a_character", f"{name}, at character {error.start}") from None


def _branching(chosen: list[Message], rejected: list[Message]) -> Converted:
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
        raise RowProblem("response_of_many_messages", f"{column} holds {len(messages)} messages, expected one")
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
        raise RowProblem("wrong_type", f"{column} is {_kind(value)}, expected a list of messages")
    messages = []
    for item in value:
        if not isinstance(item, dict):
            raise RowProblem("wrong_type", f"a message in {column} is {_kind(item)}")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RowProblem("unknown_role", f"{role!r} in {column}; known: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise RowProblem("wrong_type", f"a message's content in {column} is {_kind(content)}, expected text")
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
        raise RowProblem("wrong_type", f"{column} is {_kind(value)}, expected text")
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
