"""From messages to token ids: the chat template, where the response begins, how it ends, and what is too long.

The boundary between prompt and response is decided on token ids: the prompt's ids must begin the ids of prompt plus
response, or the row is dropped. A response ends with the template's end-of-turn token, unless its row says that it was cut off:
a model that never wrote an end must not be taught, or scored on, one there.

Control tokens are the template's alone: one that stands in a row's text is encoded as the text that it is, unless
`data.special_tokens` is parse. Such rows are counted.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import ConfigError
from pipeline.models.control_tokens import amid, control_tokens, encode_text
from pipeline.pairs.messages import Message, texts_in
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.tokenised.tails import Tails

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows that the tokenizer gets at once: it spreads them over all processors
_CHUNK = 512


@dataclass(frozen=True)
class Encoded:
    """A preference's token ids: of the prompt, and of each response that was asked for, with its end token if it has one."""

    preference: Preference
    prompt_ids: list[int]
    responses: list[list[int]]


class Encoder:
    """Tokenises rows as they come; `positions`: tokens that the model has positions for, if anything limits them.

    `control` counts the rows so far whose text names a control token of the tokenizer, by its name.
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
        self._control = ControlTokens(tokenizer)
        self._tails = Tails(tokenizer)
        self.control: dict[str, int] = {}

    @property
    def whole(self) -> int:
        """Rows so far whose prompt was read again with every response, as it has no special token to cut it at."""
        return self._tails.whole

    @property
    def limit(self) -> int:
        """Tokens that prompt and response may have together."""
        return self._limit

    def of(self, wanted: Data) -> Callable[[Iterable[Preference | Dropped]], Iterator[Encoded | Dropped]]:
        """How rows are encoded for a loss that learns from `wanted`."""
        return {"pairs": self.both, "prompts": self.prompts}.get(wanted, self.chosen)

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

    def prompts(self, items: Iterable[Preference | Dropped]) -> Iterator[Encoded | Dropped]:
        """Every row in order, with its prompt alone, which leaves room for a token of a response."""
        return self._encode(items, ())

    def _encode(self, items: Iterable[Preference | Dropped], sides: tuple[str, ...]) -> Iterator[Encoded | Dropped]:
        stream = iter(items)
        while chunk := list(islice(stream, _CHUNK)):
            texts = [item if isinstance(item, Dropped) else self._rendered(item, sides) for item in chunk]
            ids = iter(self._tails.encode([row.texts for row in texts if isinstance(row, _Texts) and not row.named]))
            for item, of_row in zip(chunk, texts, strict=True):
                if isinstance(of_row, Dropped):
                    yield of_row
                elif isinstance(item, Preference):
                    prompt, *whole = self._control.encode(of_row) if of_row.named else next(ids)
                    yield self._cut(item, prompt, dict(zip(sides, whole, strict=True)))

    def _rendered(self, item: Preference, sides: tuple[str, ...]) -> _Texts | Dropped:
        """The texts of the prompt, and of prompt and response for each side."""
        named = self._control.named_in([item.prompt, *(item.response(side) for side in sides), item.tools])
        for name in named:
            self.control[name] = self.control.get(name, 0) + 1
        if not named or self._data.special_tokens == "parse":
            texts = self._texts(item, sides, self._tokenizer)
            return texts if isinstance(texts, Dropped) else _Texts(texts)
        # the template gets placeholders, so that its own control tokens are those that are left
        places = {name: f"placeholder{uuid.uuid4().hex}" for name in named}
        texts = self._texts(self._control.hidden(item, places), sides, self._tokenizer)
        return texts if isinstance(texts, Dropped) else _Texts(texts, places)

    def _cut(self, item: Preference, prompt: list[int], whole: dict[str, list[int]]) -> Encoded | Dropped:
        """The responses behind `prompt` in `whole` (side to ids), shortened if that is wanted."""

        def drop(reason: str, detail: str) -> Dropped:
            return Dropped(item.source, item.row, reason, detail)

        if not prompt:
            return drop("empty_prompt", "no token")
        responses = []
        for side, ids in whole.items():
            if ids[: len(prompt)] != prompt:
                return drop("prompt_not_a_prefix", _where_it_differs(side, prompt, ids) + _merges(getattr(item, side)))
            ended = _ended(ids[len(prompt) :], self._end)
            responses.append(ended[:-1] if side in item.cut_off else ended)
            if not responses[-1]:
                return drop("empty_response", f"{side} has no token before its end")
        limit = self._limit
        # a prompt alone is answered by a token at least
        longest = len(prompt) + max(map(len, responses), default=1)
        if longest > limit:
            if responses and self._data.too_long == "drop":
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


@dataclass(frozen=True)
class _Texts:
    """A row's texts before they are tokens; `named`: control tokens that its own words name, and what stands for them."""

    texts: list[str]
    named: dict[str, str] = field(default_factory=dict)


class ControlTokens:
    """The tokenizer's control tokens, and how texts that name one are encoded without it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # <think> and its like are what a response is made of; only special tokens end or begin a turn
        self._control = control_tokens(tokenizer, bracketed=False)
        self._ids = {name: token for token, name in self._control.items()}
        self._added = {added.content: added for added in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        # the longest first: one name may hold another
        names = sorted(map(re.escape, filter(None, self._ids)), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(names)})") if names else None

    def named_in(self, value: Any) -> list[str]:
        """Control tokens that texts in `value` name, each once."""
        if self._pattern is None:
            return []
        return list(dict.fromkeys(name for text in texts_in(value) for name in self._pattern.findall(text)))

    def hidden(self, item: Preference, places: dict[str, str]) -> Preference:
        """The row with a placeholder for every control token that its words name."""

        def hide(text: str) -> str:
            return self._pattern.sub(lambda found: places[found[0]], text) if self._pattern else text

        return replace(
            item,
            prompt=_mapped(item.prompt, hide),
            chosen=hide(item.chosen),
            rejected=hide(item.rejected),
            tools=_mapped(item.tools, hide),
            calls=_mapped(item.calls, hide),
        )

    def encode(self, rendered: _Texts) -> list[list[int]]:
        """Token ids of each text: control tokens of the template as such, what the row's own words name as text."""
        return [self._encode(text, {place: name for name, place in rendered.named.items()}) for text in rendered.texts]

    def _encode(self, text: str, names: dict[str, str]) -> list[int]:
        # a tokenizer too encodes what stands between its control tokens piece by piece
        pieces = self._pattern.split(text) if self._pattern else [text]
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                ids.append(self._ids[piece])
            else:
                tokenizer = amid(self._tokenizer) if at else self._tokenizer
                ids += encode_text(tokenizer, self._restored(pieces, at, names), self._control)
        return ids

    def _restored(self, pieces: list[str], at: int, names: dict[str, str]) -> str:
        """What stands between two control tokens, without the white space that they take, and with the row's own words."""
        text = pieces[at]
        before, after = (
            self._added.get(pieces[side]) if 0 <= side < len(pieces) else None for side in (at - 1, at + 1)
        )
        text = text.lstrip() if before is not None and before.rstrip else text
        text = text.rstrip() if after is not None and after.lstrip else text
        for place, name in names.items():
            text = text.replace(place, name)
        return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, names of fields excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _chat_texts(item: Preference, sides: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    from jinja2 import TemplateError

    def rendered(messages: list[list[Message]], tools: list[dict[str, Any]], *, reply_next: bool) -> list[str]:
        how = {"tools": tools} if tools else {}
        texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_next, **how)
        return list(map(str, texts))

    try:
        texts = rendered([item.prompt], item.tools, reply_next=True)
        if sides:
            answered = [[*item.prompt, item.response(side)] for side in sides]
            texts += rendered(answered, item.tools, reply_next=False)
        if item.tools and texts[:1] == rendered([item.prompt], [], reply_next=True):
            return Dropped(item.source, item.row, "tools_not_rendered", "the chat template shows no tools")
        for number, text in enumerate(texts):
            messages = [*item.prompt, *([item.response(sides[number - 1])] if number else [])]
            called = any("tool_calls" in message for message in messages)
            if called and [text] == rendered([_without_calls(messages)], item.tools, reply_next=not number):
                return Dropped(
                    item.source, item.row, "tool_calls_not_rendered", "the chat template shows no tool calls"
                )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return Dropped(item.source, item.row, "template_refused", str(error)[:200])
    for message in item.prompt:
        if message["role"] == "tool" and message["content"].strip() not in texts[0]:
            return Dropped(
                item.source, item.row, "tool_message_not_rendered", "the chat template shows no tool's answer"
            )
    return texts


def _without_calls(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]


def _plain_texts(item: Preference, sides: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    if item.tools or item.calls or any("tool_calls" in message for message in item.prompt):
        return Dropped(
            item.source, item.row, "tools_not_rendered", "data.template=none is text without tools and tool calls"
        )
    prompt = "".join(message["content"] for message in item.prompt)
    # add_special_tokens is off for all texts alike, so the beginning-of-sequence token, if there is one, is set here
    prompt = (tokenizer.bos_token or "") + prompt if getattr(tokenizer, "add_bos_token", False) else prompt
    return [prompt, *(prompt + getattr(item, side) for side in sides)]


def _where_it_differs(name: str, prompt: list[int], full: list[int]) -> str:
    position = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    return f"{name}: token {position} of {len(prompt)} differs once a response follows"


def _merges(response: str) -> str:
    """What is said of a response that begins with white space, which many tokenizers join with what stands before."""
    if not response[:1].isspace():
        return ""
    return f"; the response begins with {response[0]!r}, which merges with the prompt's end: strip it"


def _ended(response: list[int], end: int) -> list[int]:
    # what the template puts after the turn (a newline, say) is not the response's
    if end in response:
        last = len(response) - response[::-1].index(end)
        return response[:last]
    return [*response, end]
