"""Rows of one response with what somebody thought of it, and of none. Such a row is read as the pair that has the response on both
sides, so every form of a prompt that pairs come in is one of these rows too.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.pairs.messages import ROLES, RowProblem, is_messages, kind
from pipeline.pairs.reading.json_rows import Row

# columns that hold the response, the first that a row has
RESPONSES = ("response", "completion", "output", "answer", "generation")
# that hold a conversation whose last turn is the response
_CONVERSATIONS = ("messages", "conversations", "text")
LABELS = ("label", "kto_tag", "thumbs_up", "thumb", "thumbs", "rating")
# that hold a prompt
_PROMPTS = ("prompt", "messages", "conversations", "instruction")
# in logs of thumbs and ratings, a 0 is no vote
_ZERO_IS_NO_VOTE = ("thumb", "thumbs", "rating")
_GOOD = ("true", "1", "1.0", "+1", "up", "thumbs_up", "good", "desirable", "👍")
_BAD = ("false", "0", "0.0", "-1", "-1.0", "down", "thumbs_down", "bad", "undesirable", "👎")


def is_unpaired(row: Row) -> bool:
    """Whether a row has one response and a label that can be read, or a column for a label that is empty."""
    column = label_column(row)
    if column is None or response_column(row) is None or "chosen" in row or "rejected" in row:
        return False
    try:
        label_of(row)
    except RowProblem as problem:
        return problem.reason == "no_label"
    return True


def response_column(row: Row) -> str | None:
    """The column that holds the row's response, or the conversation that ends with it."""
    names = [*RESPONSES, *_CONVERSATIONS]
    return next((name for name in names if row.get(name) is not None), None)


def label_column(row: Row) -> str | None:
    """The column that holds the row's label: one with a value, if there is one."""
    named = [name for name in LABELS if name in row]
    return next((name for name in named if row[name] is not None), named[0] if named else None)


def label_of(row: Row) -> bool:
    """Whether the row calls its response good. RowProblem if it says nothing, or nothing that is known."""
    column = label_column(row)
    if column is None:
        raise RowProblem("no_label", f"none of {', '.join(LABELS)}")
    value = row[column]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise RowProblem("no_label", f"{column} is empty")
    word = str(value).strip().lower().replace(" ", "_") if isinstance(value, str | int | float) else ""
    if column in _ZERO_IS_NO_VOTE and word in ("0", "0.0"):
        raise RowProblem("no_label", f"{column} is 0, which is neither up nor down")
    if word not in (*_GOOD, *_BAD):
        shown = repr(value)[:40] if word else kind(value)
        raise RowProblem("unknown_label", f"{column} is {shown}, expected true or false, 1 or 0, 1 or -1, up or down")
    return word in _GOOD


def as_pair(row: Row) -> Row:
    """The row as a pair that has its response on both sides. RowProblem if it has no response."""
    column = response_column(row)
    if column is None:
        raise RowProblem("missing_field", "response")
    kept = {name: value for name, value in row.items() if name not in (column, *LABELS, f"{column}_cut_off")}
    value = row[column]
    if column in ("messages", "conversations") and not (is_messages(value) and len(value) > 1):
        raise RowProblem("last_turn_not_assistant", f"{column} holds no request with a response")
    return {**kept, "chosen": value, "rejected": value, "chosen_cut_off": row.get(f"{column}_cut_off")}


def is_prompt(row: Row) -> bool:
    """Whether a row has a prompt that can stand alone, and no pair beside it."""
    given = [row.get(name) for name in _PROMPTS]
    pair = [row.get(name) for name in ("chosen", "rejected")]
    return any(isinstance(value, str | list) and value for value in given) and pair == [None, None]


def asked(row: Row) -> Row:
    """The row as a pair of a response that says nothing, for the sake of its prompt; a conversation goes to its last request."""
    answered = [name for name in ("messages", "conversations") if _is_answered(row.get(name))]
    return {**row, **{name: row[name][:-1] for name in answered}, "chosen": "-", "rejected": "-"}


def _is_answered(messages: Any) -> bool:
    if not is_messages(messages):
        return False
    speaker = messages[-1].get("role", messages[-1].get("from"))
    return len(messages) > 1 and isinstance(speaker, str) and ROLES.get(speaker.lower()) == "assistant"
