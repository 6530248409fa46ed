"""From messages to token ids: the chat template, where the response begins, how it ends, and what is too long.

The boundary between prompt and response is decided on token ids: the prompt's ids must begin the ids of prompt plus
response, or the row is dropped. A response ends with the template's end-of-turn token, unless its row says that it was cut off:
a model that never wrote an end must not be taught, or scored on, one there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError
from pipeline.pairs.preferences import Dropped, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows that the tokenizer gets at once: it spreads them over all processors
_CHUNK = 2000


@dataclass(frozen=True)
class Encoded:
    """A preference's token ids: of the prompt, and of each response that was asked for, with its end token if it has one."""

    preference: Preference
    prompt_ids: list[int]
    responses: list[list[int]]


class Encoder:
    """Tokenises rows as they come; `positions`: tokens that the model has positions for, if anything limits them.

    Raises ConfigError if the tokenizer cannot do what `data` asks.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> None:
        if data.template == "chat" and not tokenizer.chat_template:
            raise ConfigError("the model's tokenizer has no chat template: set data.template=none for plain text")
        end = end_of_turn_id(tokenizer) if data.template == "chat" else tokenizer.eos_token_id
        if end is None:
            raise ConfigError("the tokenizer names no end-of-sequence token, so a response's end cannot be marked")
        self._data, self._tokenizer, self._end = data, tokenizer, end
        self._limit, self._limit_is = data.max_length or sys.maxsize, f"data.max_length is {data.max_length}"
        if positions is not None and positions < self._limit:
            self._limit, self._limit_is = positions, f"the model reads {positions}"
        self._texts = _chat_texts if data.template == "chat" else _plain_texts

    def both(self, items: Iterable[Preference | Dropped]) -> Iterator[Encoded | Dropped]:
        """Every row in order, with chosen and rejected; responses of equal ids are no pair."""
        for encoded in self._encode(items, ("chosen", "rejected")):
            if isinstance(encoded, Encoded) and encoded.responses[0] == encoded.responses[1]:
                item, length = encoded.preference, len(encoded.responses[0])
                cut = len(encoded.prompt_ids) + length == self._limit
                yield (
                    Dropped(item.source, item.row, "identical_after_truncation", f"equal in the first {length} tokens")
                    if cut and self._data.too_long == "truncate_response"
                    else Dropped(item.source, item.row, "identical_responses", "equal token ids")
                )
            else:
                yield encoded

    def chosen(self, items: Iterable[Preference | Dropped]) -> Iterator[Encoded | Dropped]:
        """Every row in order, with its chosen response alone."""
        return self._encode(items, ("chosen",))

    def _encode(self, items: Iterable[Preference | Dropped], sides: tuple[str, ...]) -> Iterator[Encoded | Dropped]:
        stream = iter(items)
        while chunk := list(islice(stream, _CHUNK)):
            texts = [None if isinstance(item, Dropped) else self._texts(item, sides, self._tokenizer) for item in chunk]
            flat = [text for of_row in texts if isinstance(of_row, list) for text in of_row]
            ids = iter(self._tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
            for item, of_row in zip(chunk, texts, strict=True):
                if isinstance(item, Dropped):
                    yield item
                elif isinstance(of_row, Dropped):
                    yield of_row
                else:
                    yield self._cut(item, next(ids), {side: next(ids) for side in sides})

    def _cut(self, item: Preference, prompt: list[int], whole: dict[str, list[int]]) -> Encoded | Dropped:
        """The responses behind `prompt` in `whole` (side to ids), shortened if that is wanted."""

        def drop(reason: str, detail: str) -> Dropped:
            return Dropped(item.source, item.row, reason, detail)

        if not prompt:
            return drop("empty_prompt", "no token")
        responses = []
        for side, ids in whole.items():
            if ids[: len(prompt)] != prompt:
                return drop("prompt_not_a_prefix", _where_it_differs(side, prompt, ids))
            ended = _ended(ids[len(prompt) :], self._end)
            responses.append(ended[:-1] if side in item.cut_off else ended)
            if not responses[-1]:
                return drop("empty_response", f"{side} has no token before its end")
        limit = self._limit
        longest = len(prompt) + max(map(len, responses))
        if longest > limit:
            if self._data.too_long == "drop":
                return drop("too_long", f"{longest} tokens, {self._limit_is}")
            if len(prompt) >= limit:
                return drop("prompt_too_long", f"{len(prompt)} tokens, {self._limit_is}")
            responses = [ids[: limit - len(prompt)] for ids in responses]
        return Encoded(item, prompt, responses)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn under the chat template; the end-of-sequence token without a template.

    Raises ConfigError if neither is known, or if the template refuses a conversation.
    """
    from jinja2 import TemplateError

    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if tokenizer.chat_template:
        marker = "refscoreboundary"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateError as error:
            raise ConfigError(f"the chat template refuses a user's turn with its answer ({error})") from None
        _, marked, after = text.rpartition(marker)
        for token in tokenizer(after, add_special_tokens=False)["input_ids"] if marked else []:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer names no end-of-sequence token, so a response's end cannot be marked")
    return int(tokenizer.eos_token_id)


def _chat_texts(item: Preference, sides: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True)
        turns = [{"role": "assistant", "content": getattr(item, side)} for side in sides]
        whole = [tokenizer.apply_chat_template([*item.prompt, turn], tokenize=False) for turn in turns]
    except (TemplateError, TypeError, KeyError) as error:
        return Dropped(item.source, item.row, "template_refused", str(error)[:200])
    return [str(prompt), *map(str, whole)]


def _plain_texts(item: Preference, sides: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    prompt = "".join(message["content"] for message in item.prompt)
    # add_special_tokens is off for all texts alike, so the beginning-of-sequence token, if there is one, is set here
    prompt = (tokenizer.bos_token or "") + prompt if getattr(tokenizer, "add_bos_token", False) else prompt
    return [prompt, *(prompt + getattr(item, side) for side in sides)]


def _where_it_differs(name: str, prompt: list[int], full: list[int]) -> str:
    position = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    return f"{name}: token {position} of {len(prompt)} differs once a response follows"


def _ended(response: list[int], end: int) -> list[int]:
    # what the template puts after the turn (a newline, say) is not the response's
    if end in response:
        last = len(response) - response[::-1].index(end)
        return response[:last]
    return [*response, end]
