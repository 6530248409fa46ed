"""Messages of a row: who speaks, what is said, which tools are called.

Text given as parts becomes text; a part that is no text, and anything else that cannot be read, is a RowProblem.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

from pipeline.pairs.reading.json_rows import Row

# `role` and `content`, both text; `tool_calls`, `tool_call_id` and `name` if the message has them
Message = dict[str, Any]

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
READ_OF_A_MESSAGE = {"role", "from", "content", "value", "tool_calls", "tool_call_id"}
_WRITTEN_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class RowProblem(Exception):
    """A row that cannot become a preference; `reason` is a short fixed word, `detail` what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def is_messages(value: object) -> bool:
    """Whether this is a list of objects, and not of the parts of one text."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value) and not _parts(value)
    )


def messages_of(value: object, column: str) -> list[Message]:
    """The messages that a column holds."""
    if value is None:
        raise RowProblem("missing_field", column)
    if not isinstance(value, list) or not value:
        raise RowProblem("wrong_type", f"{column} is {kind(value)}, expected a list of messages")
    return [_message(item, column) for item in value]


def text_of(row: Row, column: str) -> str:
    """The text that a column holds."""
    value = row.get(column)
    if value is None:
        raise RowProblem("missing_field", column)
    if isinstance(value, list) and _parts(value):
        return _joined(value, column)
    if not isinstance(value, str):
        raise RowProblem("wrong_type", f"{column} is {kind(value)}, expected text")
    if _WRITTEN_AS_TEXT.match(value):
        raise RowProblem("messages_as_text", f"{column} is a list of messages written as text: store it as a list")
    return value


def response_of(row: Row, column: str, prompt: list[Message]) -> Message:
    """The assistant's message that a column holds: as text, as a message, or behind a repetition of the prompt."""
    value = row.get(column)
    if isinstance(value, str) or (isinstance(value, list) and _parts(value)):
        return {"role": "assistant", "content": text_of(row, column)}
    messages = messages_of([value] if isinstance(value, dict) else value, column)
    if len(messages) > 1:
        before = [message for message in prompt if message["role"] != "system" or messages[0]["role"] == "system"]
        if messages[:-1] != before:
            raise RowProblem(
                "response_of_many_messages",
                f"{column} holds {len(messages)} messages, expected one, or the prompt's and one more",
            )
    if messages[-1]["role"] != "assistant":
        raise RowProblem("last_turn_not_assistant", f"{column} is by {messages[-1]['role']!r}")
    return messages[-1]


def branching(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], Message, Message]:
    """What two conversations share, and the message by which each ends."""
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
    return chosen[:-1], chosen[-1], rejected[-1]


def dialogue(text: str) -> list[Message]:
    r"""The messages of a text of turns that begin with "\n\nHuman:" and "\n\nAssistant:"; what stands before is the system's."""
    parts = _SPEAKER.split(text)
    messages = [{"role": "system", "content": parts[0].strip()}] if parts[0].strip() else []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": content.strip()})
    return messages


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The tools that a row describes, as a list or as JSON text."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise RowProblem("wrong_type", "tools is text that is no JSON") from None
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowProblem("wrong_type", f"tools is {kind(value)}, expected a list of objects")
    return [_without_nulls(tool) for tool in value]


def must_alternate(prompt: Iterable[Message]) -> None:
    """Raise RowProblem if the assistant speaks twice without anything between, the response included."""
    roles = [*(message["role"] for message in prompt), "assistant"]
    for number, (one, following) in enumerate(pairwise(roles)):
        if one == following == "assistant":
            last = number == len(roles) - 2
            raise RowProblem(
                "assistant_after_assistant",
                "the prompt ends with the assistant's own turn" if last else f"messages {number} and {number + 1}",
            )


def must_be_unicode(prompt: list[Message], others: dict[str, object]) -> None:
    """Raise RowProblem for half a character (a lone surrogate), which JSON can write and no tokenizer reads."""
    for name, value in [*((message["role"], message) for message in prompt), *others.items()]:
        for text in texts_in(value):
            # known without a look at its characters for most
            if text.isascii():
                continue
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RowProblem("half_a_character", f"{name}, at character {error.start}") from None


def texts_in(value: object) -> list[str]:
    """Every text in a value of lists and objects, names of fields included."""
    if isinstance(value, str):
        return [value]
    items = chain.from_iterable(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    texts: list[str] = []
    for item in items:
        # most are texts, for each of which a call would take longer than all else
        if isinstance(item, str):
            texts.append(item)
        else:
            texts += texts_in(item)
    return texts


def kind(value: object) -> str:
    """A value's type for people."""
    return "missing" if value is None else type(value).__name__


def _message(item: object, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowProblem("wrong_type", f"a message in {column} is {kind(item)}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowProblem("unknown_role", f"{str(role)[:40]!r} in {column}; known: {', '.join(ROLES)}")
    calls = item.get("tool_calls")
    if isinstance(content, list) and content:
        content = _joined(content, column)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowProblem("wrong_type", f"a message's content in {column} is {kind(content)}, expected text")
    message: Message = {"role": ROLES[role.lower()], "content": content}
    if calls:
        message["tool_calls"] = _calls(calls, column)
    if message["role"] == "tool":
        message |= {name: item[name] for name in ("tool_call_id", "name") if isinstance(item.get(name), str)}
    return message


def _calls(calls: object, column: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowProblem("wrong_type", f"tool_calls in {column} is {kind(calls)}, expected a list of objects")
    return [_with_arguments_as_objects(_without_nulls(call)) for call in calls]


def _with_arguments_as_objects(call: dict[str, Any]) -> dict[str, Any]:
    # servers give arguments as JSON text; templates write them as JSON, and would quote them twice
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return call
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function
    return call


def _without_nulls(value: Any) -> Any:
    # Parquet gives every object the fields of all objects in its column
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parts(value: list[Any]) -> bool:
    """Whether a list is one text in parts: objects with a type and no speaker."""
    return bool(value) and all(
        isinstance(item, dict) and isinstance(item.get("type"), str) and "role" not in item and "from" not in item
        for item in value
    )


def _joined(parts: list[Any], column: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            seen = part.get("type") if isinstance(part, dict) else kind(part)
            raise RowProblem("content_not_text", f"a part in {column} is {str(seen)[:40]!r}, only text is read")
        texts.append(part["text"])
    return "".join(texts)
