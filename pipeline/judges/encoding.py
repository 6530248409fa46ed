"""A conversation as a judge's token ids, in which no text that is judged can act as a control token of the judge; a reply as text.

The chat template is rendered around placeholders; its own parts are encoded with control tokens, what stands at the
placeholders without. A conversation that names no control token is encoded in one piece, as the model was trained.
A template that can be told so does not ask for thoughts.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.judges.asking.verdicts import CLOSED, OPENED
from pipeline.models.control_tokens import broken, control_tokens, encode_text, encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SWITCH = "enable_thinking"
Turn = dict[str, str]


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, reply_next: bool) -> list[int]:
    """Token ids of `turns` under the tokenizer's chat template; `reply_next`: the model's own turn follows."""
    turns = [{**turn, "content": turn["content"].encode("utf-8", "replace").decode()} for turn in turns]
    control = control_tokens(tokenizer)
    if not any(_acts(tokenizer, turn["content"], control) for turn in turns):
        return encoded(tokenizer, _rendered(tokenizer, turns, reply_next=reply_next))
    places = {f"placeholder{uuid.uuid4().hex}": turn["content"] for turn in turns}
    rest = _rendered(
        tokenizer,
        [{**turn, "content": place} for turn, place in zip(turns, places, strict=True)],
        reply_next=reply_next,
    )
    if any(rest.count(place) != 1 for place in places):
        # a template that does more with a text than show it: it gets the text with its control tokens broken
        safe = [{**turn, "content": broken(turn["content"], control)} for turn in turns]
        return encoded(tokenizer, _rendered(tokenizer, safe, reply_next=reply_next))
    ids: list[int] = []
    for place in sorted(places, key=rest.index):
        before, _, rest = rest.partition(place)
        ids += encoded(tokenizer, before) + encode_text(tokenizer, places[place], control)
    return ids + encoded(tokenizer, rest)


def knows_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template or the vocabulary has anything to do with thoughts before a reply."""
    template = str(tokenizer.chat_template)
    return _SWITCH in template or OPENED in template or OPENED in tokenizer.get_vocab()


def opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model's turn begins inside a thought, which its template opens and cannot be told not to."""
    return _rendered(tokenizer, [{"role": "user", "content": "-"}], reply_next=True).rstrip().endswith(OPENED)


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, inside_thought: bool) -> str:
    """What a model wrote, without special tokens but with the marks of its thoughts; `inside_thought`: its prompt opened one."""
    marks = (OPENED, CLOSED)
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, one in added if one.special)}
    left_out = special - {token for token, one in added if one.content in marks}
    text = str(tokenizer.decode([token for token in ids if token not in left_out], skip_special_tokens=False))
    return OPENED + text if inside_thought else text


def _acts(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]) -> bool:
    named = any(name in text for name in control.values())
    return named or bool(control.keys() & set(encoded(tokenizer, text)))


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, reply_next: bool) -> str:
    how = {_SWITCH: False} if reply_next and _SWITCH in str(tokenizer.chat_template) else {}
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=reply_next, **how))
