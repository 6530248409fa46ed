"""A reasoned verdict as JSON: the schema that a server is asked to hold replies to, and the verdict in a reply of that form."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)

_END_OF_THOUGHT = "</think>"
# the comparison stands first: a verdict that is written before its reasons rests on none
_SCHEMA = {
    "type": "object",
    "properties": {
        "comparison": {"type": "string", "description": "the two responses compared in a few sentences"},
        "verdict": {"type": "string", "enum": ["A", "B", "tie"]},
    },
    "required": ["comparison", "verdict"],
    "additionalProperties": False,
}
_AS_JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": _SCHEMA}}
}


class Form:
    """Whether a server's replies are asked for as JSON: until it refuses a request for that, and answers without."""

    def __init__(self, judge: str, explain: Callable[[BaseException], str], *, as_json: bool) -> None:
        self._judge, self._explain, self._as_json = judge, explain, as_json
        self._lock = threading.Lock()

    def answer(self, send: Callable[[dict[str, Any]], Answer]) -> Answer:
        """What `send` gives for the arguments of a request that say its form. Raises what `send` raises without them."""
        import openai

        if not self._as_json:
            return send({})
        try:
            return send(_AS_JSON)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            refusal = error
        # refused again it was not for the form
        answer = send({})
        with self._lock:
            if self._as_json:
                log.info("judge %s: replies are free text, not JSON: %s", self._judge, self._explain(refusal))
            self._as_json = False
        return answer


def stated_in_json(reply: str) -> str | None:
    """The field "verdict" of a reply that is a JSON object, after a thought or without; empty if it is no text. None if the reply
    is no such object.
    """
    parts = reply.split(_END_OF_THOUGHT)
    for first in range(len(parts)):
        text = _END_OF_THOUGHT.join(parts[first:]).strip()
        if text.startswith("{") and text.endswith("}"):
            try:
                content = json.loads(text, strict=False)
            except (ValueError, RecursionError):
                continue
            if "verdict" in content:
                return content["verdict"] if isinstance(content["verdict"], str) else ""
    return None
