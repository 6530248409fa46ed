"""Ranked data: several responses a row, with scores or ranks. Each is read as the pair that has it on both sides, so every form
of a prompt that pairs come in is one of ranked data too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pipeline.pairs.messages import RowProblem, kind
from pipeline.pairs.reading.json_rows import Row

# columns that hold the responses, the first that a row has
_LISTS = ("responses", "completions", "generations", "answers", "outputs", "candidates")
# lists beside them, an entry per response; of scores the highest is best, of ranks the lowest
_SCORES = ("scores", "ratings", "rating", "rewards", "score", "reward")
_RANKS = ("ranks", "rank")
# fields of a response that is an object, the first that it has
_TEXTS = ("response", "answer", "completion", "text", "output", "generation", "message")
_OWN_SCORES = ("overall_score", "fine-grained_score", "score", "rating", "reward")
_OWN_RANKS = ("rank",)


def is_ranked(row: Row) -> bool:
    """Whether a row has a list of responses, and scores or ranks in them or beside them."""
    column = list_column(row)
    if column is None or "chosen" in row or "rejected" in row:
        return False
    return score_column(row) is not None or any(
        isinstance(item, dict) and _first(item, (*_OWN_SCORES, *_OWN_RANKS)) for item in row[column]
    )


def list_column(row: Row) -> str | None:
    """The column that holds the row's responses."""
    return next((name for name in _LISTS if isinstance(row.get(name), list) and row[name]), None)


def score_column(row: Row) -> str | None:
    """The column that holds a list of scores or of ranks beside the responses."""
    return next((name for name in (*_SCORES, *_RANKS) if isinstance(row.get(name), list)), None)


def scored_responses(row: Row) -> list[tuple[Row, float] | RowProblem]:
    """Every response as a row that has it on both sides, with its score; or why it is not read. RowProblem if none is."""
    column = list_column(row)
    if column is None:
        raise RowProblem("missing_field", f"a list of responses ({', '.join(_LISTS)})")
    items, beside = row[column], score_column(row)
    scores = row[beside] if beside else [None] * len(items)
    if len(scores) != len(items):
        raise RowProblem("scores_do_not_match", f"{len(items)} {column} and {len(scores)} {beside}")
    kept = {name: value for name, value in row.items() if name not in (column, *_SCORES, *_RANKS)}
    found: list[tuple[Row, float] | RowProblem] = []
    for number, (item, score) in enumerate(zip(items, scores, strict=True), 1):
        where = f"response {number} of {len(items)}"
        value = _number(score, beside) if beside else _own_score(item)
        text = _text(item)
        if text is None:
            found.append(RowProblem("wrong_type", f"{where} is {kind(item)}, expected text or messages"))
        elif value is None:
            found.append(RowProblem("no_score", f"{where} has no number as its score or rank"))
        else:
            found.append(({**kept, "chosen": text, "rejected": text}, value))
    return found


def first_as_pair(row: Row) -> Row:
    """The first response that is read, as a row that has it on both sides. RowProblem if none is."""
    found = next((one for one in scored_responses(row) if not isinstance(one, RowProblem)), None)
    if found is None:
        raise RowProblem("fewer_than_two_responses")
    return found[0]


def unread_fields(row: Row) -> Iterable[str]:
    """Fields of the row's responses that nothing reads."""
    column = list_column(row)
    for item in row[column] if column else []:
        if not isinstance(item, dict) or "role" in item or "from" in item:
            continue
        read = {_first(item, _TEXTS), *([] if score_column(row) else [_first(item, (*_OWN_SCORES, *_OWN_RANKS))])}
        yield from (f"{column}[].{name}" for name, value in item.items() if value is not None and name not in read)


def _text(item: Any) -> Any:
    """What a response says: a text, a message or messages; None if it is none of them."""
    if isinstance(item, dict) and "role" not in item and "from" not in item:
        name = _first(item, _TEXTS)
        item = item[name] if name else None
    return item if isinstance(item, str | dict | list) else None


def _own_score(item: Any) -> float | None:
    # one that is no number (N/A) does not keep the next from being read
    if not isinstance(item, dict):
        return None
    values = (_number(item.get(name), name) for name in (*_OWN_SCORES, *_OWN_RANKS))
    return next((value for value in values if value is not None), None)


def _number(value: Any, column: str) -> float | None:
    """A score as a number of which the highest is best; None if it is no finite number."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return -number if column in (*_RANKS, *_OWN_RANKS) else number


def _first(item: dict[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if item.get(name) is not None), None)
