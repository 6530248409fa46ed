"""From preferences to pairs of token ids: chat template, boundary, length, split.

The boundary between prompt and response is decided on token ids: the prompt's ids must begin the ids of prompt plus
response, or the row is dropped. A response ends with the template's end-of-turn token. The split is by prompt: a prompt
is never on both sides, and adding rows moves no other row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.config import DataConfig
from pipeline.errors import ConfigError, DataError
from pipeline.formats import Message
from pipeline.preferences import Dropped, Preference, open_source
from pipeline.rows import source_digest
from pipeline.schema import DROPPED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 2000


@dataclass(frozen=True)
class Pair:
    """One row of pairs.parquet before its scores are known."""

    pair_id: str
    split: str
    preference: Preference
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class PairSet:
    """All pairs of an experiment, what was left out, and where they came from."""

    pairs: list[Pair]
    dropped: list[Dropped]
    formats: dict[str, str]
    digests: dict[str, str]

    def dropped_table(self) -> pa.Table:
        """dropped.parquet's content."""
        columns = {"source": "source", "source_row": "row", "reason": "reason", "detail": "detail"}
        return pa.table({to: [getattr(row, of) for row in self.dropped] for to, of in columns.items()}, schema=DROPPED)


class PairStream:
    """Every row of every source of `data`, tokenised, as it is read: a pair, or why it is none.

    `formats` and `digests` of a source are known once its rows come. Raises ConfigError where the tokenizer cannot do what
    is asked, DataError where a source cannot be read.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data, self._encode = data, _encoder(data, tokenizer)
        self.formats: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def __iter__(self) -> Iterator[Pair | Dropped]:
        data = self._data
        seen: set[bytes] = set()
        held_out: set[bytes] = set()
        # held-out data first, so that its prompts are known when the training data is read
        sources = ([(data.eval_path, "eval")] if data.eval_path else []) + [(path, "train") for path in data.path]
        for name, role in sources:
            source = open_source(name, data)
            self.formats[name], self.digests[name] = source.format, source.digest
            for item in self._encode(source.preferences()):
                if isinstance(item, Dropped):
                    yield item
                    continue
                preference, prompt_ids, chosen_ids, rejected_ids = item
                prompt = _digest(prompt_ids)
                if role == "train" and prompt in held_out:
                    yield Dropped(name, preference.row, "prompt_is_held_out", f"also in {data.eval_path}")
                    continue
                pair_id = _pair_id(prompt_ids, chosen_ids, rejected_ids, split_rule(data))
                if bytes.fromhex(pair_id) in seen:
                    yield Dropped(name, preference.row, "duplicate", f"pair {pair_id[:12]} was read before")
                    continue
                seen.add(bytes.fromhex(pair_id))
                if role == "eval":
                    held_out.add(prompt)
                split = role if data.eval_path else _split_of(prompt, data.eval_fraction)
                yield Pair(pair_id, split, preference, prompt_ids, chosen_ids, rejected_ids)


def build_pairs(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PairSet:
    """All pairs of `data` in memory; `pipeline.pair_table` keeps them on disk instead.

    Raises DataError where nothing is left to train on (with the reasons), and what `PairStream` raises.
    """
    stream = PairStream(data, tokenizer)
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for item in stream:
        (dropped if isinstance(item, Dropped) else pairs).append(item)  # type: ignore[arg-type]  # each to its own kind
    must_train(any(pair.split == "train" for pair in pairs), data, count_reasons(dropped))
    return PairSet(pairs, dropped, stream.formats, stream.digests)


def must_train(some: bool, data: DataConfig, reasons: dict[str, int]) -> None:  # noqa: FBT001  # a fact, no option
    """Raise DataError where no pair of the training split is left, with what became of the rows."""
    if not some:
        said = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "no rows"
        raise DataError(f"no pair is left to train on from {', '.join(data.path)} ({said})")


def count_reasons(dropped: Iterable[Dropped]) -> dict[str, int]:
    """How many rows each reason dropped, most frequent first."""
    counts: dict[str, int] = {}
    for row in dropped:
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def source_digests(data: DataConfig) -> dict[str, str | None]:
    """Digest of every local file that `data` reads now; None where only loading would tell."""
    return {name: source_digest(name) for name in [*([data.eval_path] if data.eval_path else []), *data.path]}


def split_rule(data: DataConfig) -> str:
    """The rule that decides a pair's split, as it enters `pair_id`."""
    return "eval_path" if data.eval_path else f"prompt-hash<{data.eval_fraction}"


def prompt_id_of(prompt_ids: Sequence[int]) -> str:
    """Identity of a prompt across tables: 16 hex digits of a digest of its token ids."""
    return _digest(prompt_ids).hex()[:16]


def prompt_text(prompt: list[Message]) -> str:
    """A prompt for people: the request itself if it is a single one, else every turn with its role."""
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1 and len(prompt) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn under the chat template; the end-of-sequence token without a template.

    Raises ConfigError where neither is known.
    """
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    if tokenizer.chat_template:
        marker = "refscoreboundary"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        after = tokenizer(text[text.rindex(marker) + len(marker) :], add_special_tokens=False)["input_ids"]
        for token in after:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer names no end-of-sequence token, so a response's end cannot be marked")
    return int(tokenizer.eos_token_id)


# --- text to ids

Encoded = tuple[Preference, list[int], list[int], list[int]]


def encode_chosen(
    items: Sequence[Preference], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]] | Dropped]:
    """Ids of every item's prompt and chosen response, by the same rules as for pairs; `rejected` is not looked at."""
    render, end = _rules(data, tokenizer)
    rendered = [render(item, tokenizer) for item in items]
    texts = [text for three in rendered if not isinstance(three, Dropped) for text in three[:2]]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [
        three if isinstance(three, Dropped) else _cut_one(item, next(ids), next(ids), end, data)
        for item, three in zip(items, rendered, strict=True)
    ]


def _encoder(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Iterable[Preference | Dropped]], Iterator[Encoded | Dropped]]:
    render, end = _rules(data, tokenizer)

    def encode(items: Iterable[Preference | Dropped]) -> Iterator[Encoded | Dropped]:
        stream = iter(items)
        while chunk := list(islice(stream, _CHUNK)):
            rendered: list[Preference | Dropped] = []
            texts: list[str] = []
            for item in chunk:
                three = item if isinstance(item, Dropped) else render(item, tokenizer)
                if isinstance(three, Dropped):
                    rendered.append(three)
                else:
                    rendered.append(item)
                    texts += three
            ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
            for item in rendered:
                if isinstance(item, Dropped):
                    yield item
                else:
                    yield _cut(item, next(ids), next(ids), next(ids), end, data)

    return encode


def _rules(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Callable[[Preference, PreTrainedTokenizerBase], list[str] | Dropped], int]:
    """How texts are made of a preference, and the token that ends a response."""
    if data.template == "chat" and not tokenizer.chat_template:
        raise ConfigError("the model's tokenizer has no chat template: set data.template=none for plain text")
    end = end_of_turn_id(tokenizer) if data.template == "chat" else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer names no end-of-sequence token, so a response's end cannot be marked")
    return _chat_texts if data.template == "chat" else _plain_texts, end


def _chat_texts(item: Preference, tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True)
        sides = [
            tokenizer.apply_chat_template([*item.prompt, {"role": "assistant", "content": text}], tokenize=False)
            for text in (item.chosen, item.rejected)
        ]
    except (TemplateError, TypeError, KeyError) as error:
        return Dropped(item.source, item.row, "template_refused", str(error)[:200])
    return [str(prompt), *map(str, sides)]


def _plain_texts(item: Preference, tokenizer: PreTrainedTokenizerBase) -> list[str] | Dropped:
    prompt = "".join(message["content"] for message in item.prompt)
    # add_special_tokens is off for all texts alike, so the beginning-of-sequence token, where there is one, is set here
    prompt = (tokenizer.bos_token or "") + prompt if getattr(tokenizer, "add_bos_token", False) else prompt
    return [prompt, prompt + item.chosen, prompt + item.rejected]


def _cut(
    item: Preference, prompt: list[int], chosen: list[int], rejected: list[int], end: int, data: DataConfig
) -> Encoded | Dropped:
    def drop(reason: str, detail: str) -> Dropped:
        return Dropped(item.source, item.row, reason, detail)

    responses = []
    for name, full in (("chosen", chosen), ("rejected", rejected)):
        if full[: len(prompt)] != prompt:
            return drop("prompt_not_a_prefix", _where_it_differs(name, prompt, full))
        responses.append(_ended(full[len(prompt) :], end))
    if len(prompt) == 0:
        return drop("empty_prompt", "no token")
    longest = len(prompt) + max(map(len, responses))
    if longest > data.max_length:
        if data.too_long == "drop":
            return drop("too_long", f"{longest} tokens, data.max_length is {data.max_length}")
        if len(prompt) >= data.max_length:
            return drop("prompt_too_long", f"{len(prompt)} tokens, data.max_length is {data.max_length}")
        responses = [ids[: data.max_length - len(prompt)] for ids in responses]
        if responses[0] == responses[1]:
            return drop("identical_after_truncation", f"equal in the first {len(responses[0])} tokens")
    if responses[0] == responses[1]:
        return drop("identical_responses", "equal token ids")
    return item, prompt, responses[0], responses[1]


def _cut_one(
    item: Preference, prompt: list[int], full: list[int], end: int, data: DataConfig
) -> tuple[list[int], list[int]] | Dropped:
    def drop(reason: str, detail: str) -> Dropped:
        return Dropped(item.source, item.row, reason, detail)

    if full[: len(prompt)] != prompt:
        return drop("prompt_not_a_prefix", _where_it_differs("response", prompt, full))
    if not prompt:
        return drop("empty_prompt", "no token")
    response = _ended(full[len(prompt) :], end)
    if len(prompt) + len(response) > data.max_length:
        if data.too_long == "drop" or len(prompt) >= data.max_length:
            return drop("too_long", f"{len(prompt) + len(response)} tokens, data.max_length is {data.max_length}")
        response = response[: data.max_length - len(prompt)]
    return prompt, response


def _where_it_differs(name: str, prompt: list[int], full: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    return f"{name}: token {at} of {len(prompt)} differs once a response follows"


def _ended(response: list[int], end: int) -> list[int]:
    # what the template puts after the turn (a newline, say) is not the response's
    if end in response:
        last = len(response) - response[::-1].index(end)
        return response[:last]
    return [*response, end]


# --- identities


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.sha256(b"refscore-prompt" + np.asarray(ids, dtype="<i4").tobytes()).digest()


def _pair_id(prompt: list[int], chosen: list[int], rejected: list[int], rule: str) -> str:
    state = hashlib.sha256(b"refscore-pair\x01")
    for ids in (prompt, chosen, rejected):
        state.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i4").tobytes())
    state.update(rule.encode())
    return state.hexdigest()[:32]


def _split_of(prompt: bytes, fraction: float) -> str:
    return "eval" if int.from_bytes(prompt[:8], "big") < fraction * 2**64 else "train"
