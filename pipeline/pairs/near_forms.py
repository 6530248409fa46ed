"""Forms that hold no preference pairs but look as if they did: what each is, and what makes pairs of it."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.pairs.reading.json_rows import Row

_PAIR = "make one row of prompt, chosen and rejected of "
_ONE_RESPONSE = ("completion", "response", "output", "answer", "text")
_RANKS = ("rank", "ranks", "ranking", "score", "scores", "rating", "ratings", "reward", "rewards")
_LISTS = ("completions", "responses", "generations", "outputs", "answers", "candidates")
_TWO = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response1", "response2"),
    ("response_1", "response_2"),
    ("answer_a", "answer_b"),
    ("answer_0", "answer_1"),
    ("conversation_a", "conversation_b"),
    ("model_a", "model_b"),
    ("human_ref_A", "human_ref_B"),
    ("output_1", "output_2"),
)


def near_form(rows: list[Row]) -> str | None:
    """What most of `rows` are, with the way out; None if they look like nothing that is known."""
    for fits, said in _NEAR.values():
        if sum(map(fits, rows)) * 2 > len(rows):
            return said
    return None


def _is_openai(row: Row) -> bool:
    return "preferred_output" in row and "non_preferred_output" in row


def _is_kto(row: Row) -> bool:
    labelled = isinstance(row.get("label"), (bool, int, float)) or str(row.get("label")).lower() in ("true", "false")
    one = any(name in row for name in (*_ONE_RESPONSE, "messages", "conversations"))
    return "kto_tag" in row or (labelled and one)


def _is_stepwise(row: Row) -> bool:
    return isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list)


def _is_rated_lists(row: Row) -> bool:
    nested = any(isinstance(row.get(name), list) and len(row[name]) > 1 for name in _LISTS)
    return nested or (isinstance(row.get("output"), list) and len(row["output"]) > 1)


def _is_two_and_a_winner(row: Row) -> bool:
    return any(one in row and other in row for one, other in _TWO) or ("summaries" in row and "choice" in row)


def _is_ranked(row: Row) -> bool:
    return any(name in row for name in _RANKS) and any(
        name in row for name in (*_ONE_RESPONSE, "messages", "conversations")
    )


def _is_one_response(row: Row) -> bool:
    return any(name in row for name in (*_ONE_RESPONSE, "messages", "conversations")) and "chosen" not in row


def _is_half_a_pair(row: Row) -> bool:
    return ("chosen" in row) != ("rejected" in row)


def _is_token_ids(row: Row) -> bool:
    return any(name.endswith("_ids") or name == "input_ids" for name in row) and "chosen" not in row


_NEAR: dict[str, tuple[Callable[[Row], bool], str]] = {
    "half a pair": (_is_half_a_pair, "has one of chosen and rejected: a pair needs both"),
    "OpenAI": (
        _is_openai,
        "is in OpenAI's form: make prompt of input.messages, chosen of preferred_output, rejected of non_preferred_output",
    ),
    "stepwise": (_is_stepwise, "is stepwise data (completions with labels), of which nothing is a pair"),
    "KTO": (
        _is_kto,
        (
            "is unpaired data as KTO learns from (one response a row, with a label), and cannot be read as such: it needs a prompt "
            "(or messages that end with the response), a response, and a label of true or false, 1 or 0, 1 or -1, up or down; "
            "other names are given with --set 'data.columns={prompt: question, response: text, label: vote}'"
        ),
    ),
    "rated lists": (
        _is_rated_lists,
        "holds several responses a row, without a prompt, or scores or ranks of them, that are known: name them, for example with "
        "--set 'data.columns={prompt: question, responses: texts, scores: stars}', or "
        + _PAIR
        + "the best and another response",
    ),
    "two and a winner": (
        _is_two_and_a_winner,
        "holds two responses a row and which of them is better: " + _PAIR + "the better and the worse",
    ),
    "ranked": (
        _is_ranked,
        "holds one response a row, with a rank or score: " + _PAIR + "two rows of the same prompt, the better as chosen",
    ),
    "token ids": (_is_token_ids, "holds token ids: give the texts, which are tokenised for the model that is used"),
    "one response": (
        _is_one_response,
        "holds one response a row, as supervised fine-tuning learns from: " + _PAIR + "two responses to the same prompt",
    ),
}  # fmt: skip
