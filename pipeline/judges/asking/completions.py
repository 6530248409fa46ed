"""What a server sent back, as a verdict. Reads the bytes itself: servers answer with pages, half characters and other shapes.

A reply in which no choice can be found is a failure with a reason; one that was given, and paid, is a verdict even if unreadable.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pipeline.config.judges import JudgeConfig
from pipeline.judges.asking.prompts import letter_of, weighed
from pipeline.judges.asking.structured import stated_in_json
from pipeline.judges.asking.verdicts import CLOSED, OPENED, read_verdict
from pipeline.judges.memory import Verdict


class UnreadableReply(Exception):
    """The server answered, but not with a completion; the message says with what."""


def verdict_of(content: bytes, settings: JudgeConfig) -> Verdict:
    """The verdict in the body of a chat completion. Raises UnreadableReply if the body is no completion with a choice."""
    try:
        body = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise UnreadableReply(f"the reply is not JSON: {_start(content)}") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise UnreadableReply(f"the reply has no choices: {_start(content)}")
    text = _text(_field(choices[0], "message").get("content"))
    if settings.verdict == "token":
        value = _from_logprobs(choices[0], text, settings)
    else:
        text = _with_thought(choices[0], text)
        value = read_verdict(text)
    usage = _field(body, "usage")
    return Verdict(value, text, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))


def _with_thought(choice: dict[str, Any], text: str) -> str:
    """The text, marked as inside a thought if the reply was cut off and nothing says that the thought, if any, had ended."""
    message = _field(choice, "message")
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    if thought:  # the server tells the two apart
        return text or OPENED + thought
    whole = CLOSED in text or stated_in_json(text) is not None
    return OPENED + text if choice.get("finish_reason") == "length" and not whole else text


def _from_logprobs(choice: dict[str, Any], text: str, settings: JudgeConfig) -> float | None:
    positions = _field(choice, "logprobs").get("content")
    if not (isinstance(positions, list) and positions and isinstance(positions[0], dict)):
        # a server without log-probabilities: the letter itself
        letter = letter_of(text)
        return None if letter is None else float(letter == "A")
    mass = {"A": 0.0, "B": 0.0}
    entries = positions[0].get("top_logprobs")
    for entry in entries if isinstance(entries, list) else []:
        token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        letter = letter_of(token) if isinstance(token, str) else None
        if letter and isinstance(logprob, int | float) and not math.isnan(logprob):
            mass[letter] += math.exp(min(logprob, 0.0))
    return weighed(mass["A"], mass["B"], settings.min_mass)


def _field(holder: dict[str, Any], name: str) -> dict[str, Any]:
    value = holder.get(name)
    return value if isinstance(value, dict) else {}


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts, as some servers send them
        return "".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _start(content: bytes) -> str:
    return repr(content[:80].decode("utf-8", "replace")) if content.strip() else "it is empty"
