"""The forms that preference data comes in: does a row fit, what does it say, and which columns does that read.

FORMATS is asked in order. A conversion gives the prompt's messages and the two responses, or raises RowProblem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile

from pipeline.errors import DataError
from pipeline.pairs.messages import (
    READ_OF_A_MESSAGE,
    Message,
    RowProblem,
    branching,
    dialogue,
    is_messages,
    messages_of,
    must_alternate,
    must_be_unicode,
    response_of,
    text_of,
)
from pipeline.pairs.near_forms import near_form
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.reading.misnamed import printable

Converted = tuple[list[Message], Message, Message]

# read of a row of any form
_BESIDE = frozenset({"chosen", "rejected", "system", "tools", "topic", "chosen_cut_off", "rejected_cut_off"})
# what `refscore pairs` writes for people
_OWN_NOTES = frozenset({"margin", "differs_beyond_length", "provenance"})
# columns that would be a prompt if they were named so
_PROMPT_LIKE = ("question", "query", "input", "instruction", "context", "messages", "conversation", "conversations")
_SHOWN_COLUMNS = 20


@dataclass(frozen=True)
class Format:
    """One form: whether a row has it, what a row says, and the columns that this reads besides those of every form."""

    fits: Callable[[Row], bool]
    convert: Callable[[Row], Converted]
    reads: frozenset[str]
    chat_only: bool = False


def detect_format(name: str, rows: list[Row], *, chat: bool = True) -> str:
    """The first format (in the order of FORMATS) that most of `rows` fit, or half of them; DataError with what they are if none.

    Without a chat template (not `chat`) a dialogue in a prompt's text is plain text.
    """
    fitting = {title: sum(map(form.fits, rows)) * 2 for title, form in FORMATS.items() if chat or not form.chat_only}
    # of two rows one may be broken
    title = next(
        (title for enough in (len(rows) + 1, len(rows)) for title in fitting if fitting[title] >= enough), None
    )
    if title is not None:
        if title == "TRL implicit, strings":
            _must_have_no_other_prompt(name, rows)
        return title
    columns = sorted({shown(key) for row in rows for key in row})
    seen = ", ".join(columns[:_SHOWN_COLUMNS]) or "none"
    more = f" and {len(columns) - _SHOWN_COLUMNS} more" if len(columns) > _SHOWN_COLUMNS else ""
    if said := near_form(rows):
        raise DataError(f"{name}: columns {seen}{more}: the file {said}")
    raise DataError(
        f"{name}: columns {seen}{more} fit no known format ({'; '.join(FORMATS)}). "
        "Name them with data.columns, for example --set 'data.columns={prompt: question, chosen: good, rejected: bad}'"
    )


def unread(row: Row, format_name: str) -> Iterable[str]:
    """Columns of a row, and fields of its messages, that nothing reads."""
    read = _BESIDE | _OWN_NOTES | FORMATS[format_name].reads
    for column, value in row.items():
        if value is None:
            continue
        if column not in read or (column in ("topic", "system") and not isinstance(value, str)):
            yield shown(column)
        elif isinstance(value, (list, dict)) and column not in ("tools", *_OWN_NOTES):
            for message in value if isinstance(value, list) else [value]:
                if not isinstance(message, dict):
                    continue
                named = {"name"} if message.get("role") == "tool" else set()
                for key in message.keys() - READ_OF_A_MESSAGE - named - {"type", "text"}:
                    if message[key] is not None:
                        yield f"{shown(column)}[].{shown(key)}"


def shown(name: object) -> str:
    """A column's name for people: on one line, at most 40 characters, printable."""
    text = printable(" ".join(str(name).split()))
    return text if len(text) <= 40 else text[:39] + "…"


# --- one pair of functions a form


def _is_hh(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    dialogues = all(isinstance(side, str) and "\n\nAssistant:" in side for side in sides)
    return dialogues and ("prompt" not in row or all(str(side).lstrip().startswith("Human:") for side in sides))


def _from_hh(row: Row) -> Converted:
    prompt, chosen, rejected = branching(dialogue(text_of(row, "chosen")), dialogue(text_of(row, "rejected")))
    _must_agree(row, prompt)
    return _with_system(row, prompt), chosen, rejected


def _is_hh_prompt(row: Row) -> bool:
    prompt, sides = row.get("prompt"), (row.get("chosen"), row.get("rejected"))
    return (
        isinstance(prompt, str)
        and prompt.lstrip().startswith("Human:")
        and all(isinstance(side, str) for side in sides)
    )


def _from_hh_prompt(row: Row) -> Converted:
    text = text_of(row, "prompt")
    prompt = dialogue("\n\n" + text.lstrip())
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    responses = [_behind_prompt(text_of(row, side), text, side) for side in ("chosen", "rejected")]
    chosen, rejected = ({"role": "assistant", "content": response} for response in responses)
    return _with_system(row, prompt), chosen, rejected


def _behind_prompt(response: str, prompt: str, side: str) -> str:
    """The response of a text that may repeat the prompt, and begin with the word Assistant."""
    response = response.strip()
    if response.startswith("Human:"):
        if not response.startswith(prompt.strip()):
            raise RowProblem("prompt_contradicts_messages", f"{side} is a dialogue that does not begin with the prompt")
        response = response[len(prompt.strip()) :].strip()
    return response.removeprefix("Assistant:").strip()


def _is_sharegpt(row: Row) -> bool:
    return is_messages(row.get("conversations")) and "chosen" in row and "rejected" in row


def _from_sharegpt(row: Row) -> Converted:
    prompt = messages_of(row.get("conversations"), "conversations")
    _must_agree(row, prompt)
    return _with_responses(row, prompt)


def _is_beside_messages(row: Row) -> bool:
    return "prompt" not in row and is_messages(row.get("messages")) and _are_single(row)


def _from_beside_messages(row: Row) -> Converted:
    return _with_responses(row, messages_of(row.get("messages"), "messages"))


def _are_single(row: Row) -> bool:
    """Whether chosen and rejected are one text or message each, no conversations."""
    sides = (row.get("chosen"), row.get("rejected"))
    return all(isinstance(side, (str, dict)) or (isinstance(side, list) and len(side) == 1) for side in sides)


def _is_ultrafeedback(row: Row) -> bool:
    return isinstance(row.get("prompt"), str) and _repeats_prompt(row, "chosen") and _repeats_prompt(row, "rejected")


def _repeats_prompt(row: Row, column: str) -> bool:
    # UltraFeedback-binarized repeats the prompt inside both message lists; TRL's explicit format does not
    messages = row.get(column)
    return isinstance(messages, list) and len(messages) > 1 and is_messages(messages)


def _from_ultrafeedback(row: Row) -> Converted:
    if not _is_ultrafeedback(row):
        return _from_explicit_strings(row)
    prompt, chosen, rejected = _from_implicit_messages(row)
    _must_agree(row, prompt)
    return prompt, chosen, rejected


def _must_agree(row: Row, messages: list[Message]) -> None:
    """Raise RowProblem if the text in the column prompt is nowhere in the messages, nor they in it."""
    given = _words(row.get("prompt"))
    asked = [_words(message["content"]) for message in messages if message["role"] != "assistant"]
    # some repeat the last request, some the first, some all of the conversation
    texts = [*asked, f" {' '.join(' '.join(asked).split())} "]
    if given.strip() and not any(text.strip() and (text in given or given in text) for text in texts):
        raise RowProblem("prompt_contradicts_messages", "the text of prompt is nowhere in the messages of the row")


def _words(text: object) -> str:
    """A text's words between single spaces, to be looked for as whole words."""
    return f" {' '.join(text.split())} " if isinstance(text, str) else ""


def _is_explicit_messages(row: Row) -> bool:
    return is_messages(row.get("prompt")) and "chosen" in row and "rejected" in row


def _from_explicit_messages(row: Row) -> Converted:
    return _with_responses(row, messages_of(row.get("prompt"), "prompt"))


def _is_explicit_strings(row: Row) -> bool:
    return "prompt" in row and "chosen" in row and "rejected" in row


def _from_explicit_strings(row: Row) -> Converted:
    return _with_responses(row, [{"role": "user", "content": text_of(row, "prompt")}])


def _is_alpaca(row: Row) -> bool:
    return "prompt" not in row and isinstance(row.get("instruction"), str) and _are_single(row)


def _from_alpaca(row: Row) -> Converted:
    """Instruction and input are one request; earlier turns stand in `history` as pairs of request and response."""
    request = text_of(row, "instruction")
    if row.get("input") is not None and (more := text_of(row, "input")).strip():
        request = f"{request}\n{more}" if request.strip() else more
    prompt: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowProblem("wrong_type", "a turn in history is no pair of request and response")
        prompt += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return _with_responses(row, [*prompt, {"role": "user", "content": request}])


def _is_implicit_messages(row: Row) -> bool:
    return "prompt" not in row and is_messages(row.get("chosen")) and is_messages(row.get("rejected"))


def _from_implicit_messages(row: Row) -> Converted:
    prompt, chosen, rejected = branching(
        messages_of(row.get("chosen"), "chosen"), messages_of(row.get("rejected"), "rejected")
    )
    return _with_system(row, prompt), chosen, rejected


def _is_implicit_strings(row: Row) -> bool:
    return "prompt" not in row and isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)


def _from_implicit_strings(row: Row) -> Converted:
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    # the prompt ends at the last white space before the texts part, as a word must not be cut in two
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = sum(1 for _ in alike)
    if common < min(len(chosen), len(rejected)):
        while common and not chosen[common - 1].isspace():
            common -= 1
    prompt = chosen[:common]
    if not prompt.strip():
        raise RowProblem("no_common_prompt", "chosen and rejected share no beginning")
    one, other = ({"role": "assistant", "content": text[common:]} for text in (chosen, rejected))
    return _with_system(row, [{"role": "user", "content": prompt}]), one, other


FORMATS: dict[str, Format] = {
    "sharegpt": Format(_is_sharegpt, _from_sharegpt, frozenset({"conversations", "prompt"})),
    "messages beside responses": Format(_is_beside_messages, _from_beside_messages, frozenset({"messages"})),
    "HH-RLHF dialogue strings": Format(_is_hh, _from_hh, frozenset({"prompt"})),
    "HH-RLHF prompt beside responses": Format(_is_hh_prompt, _from_hh_prompt, frozenset({"prompt"}), chat_only=True),
    "UltraFeedback-binarized": Format(_is_ultrafeedback, _from_ultrafeedback, frozenset({"prompt"})),
    "TRL explicit, messages": Format(_is_explicit_messages, _from_explicit_messages, frozenset({"prompt"})),
    "TRL explicit, strings": Format(_is_explicit_strings, _from_explicit_strings, frozenset({"prompt"})),
    "Alpaca": Format(_is_alpaca, _from_alpaca, frozenset({"instruction", "input", "history"})),
    "TRL implicit, messages": Format(_is_implicit_messages, _from_implicit_messages, frozenset()),
    "TRL implicit, strings": Format(_is_implicit_strings, _from_implicit_strings, frozenset()),
}


def one_response(row: Row) -> tuple[list[Message], str]:
    """The prompt's messages and the one response of a row with the columns `prompt` and `response`; else RowProblem."""
    given = row.get("prompt")
    prompt = (
        [{"role": "user", "content": text_of(row, "prompt")}]
        if isinstance(given, str)
        else messages_of(given, "prompt")
    )
    response = response_of(row, "response", prompt)
    if response.get("tool_calls") or row.get("tools"):
        raise RowProblem("tool_calls_not_scored", "a row with tools or a response with tool calls is not scored alone")
    if not response["content"].strip():
        raise RowProblem("empty_response")
    prompt = _with_system(row, prompt)
    must_alternate(prompt)
    must_be_unicode(prompt, {"response": response["content"]})
    return prompt, response["content"]


def _with_responses(row: Row, prompt: list[Message]) -> Converted:
    """A prompt of its own, with the system's message if a column has it, and the two responses beside it."""
    chosen, rejected = (response_of(row, side, prompt) for side in ("chosen", "rejected"))
    return _with_system(row, prompt), chosen, rejected


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return prompt
    said = [message["content"] for message in prompt if message["role"] == "system"]
    if said and said != [system]:
        raise RowProblem("two_system_messages", "the column system says something else than the messages do")
    return prompt if said else [{"role": "system", "content": system}, *prompt]


def _must_have_no_other_prompt(name: str, rows: list[Row]) -> None:
    """Raise DataError if a column looks like the prompt of responses that stand alone."""
    for column in _PROMPT_LIKE:
        if sum(isinstance(row.get(column), (str, list)) and bool(row[column]) for row in rows) * 2 > len(rows):
            raise DataError(
                f"{name}: no column is called prompt, and {column!r} is not read beside chosen and rejected. If it is the "
                f"prompt: --set 'data.columns={{prompt: {column}}}'; if the responses begin with the prompt, leave the column out"
            )
