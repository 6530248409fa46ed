"""Control tokens of a tokenizer: which they are, and a text's token ids with none of them in it."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def control_tokens(tokenizer: PreTrainedTokenizerBase, *, bracketed: bool = True) -> dict[int, str]:
    """Tokens that structure a conversation: those called special, and if `bracketed` added ones such as <think>."""
    added = {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or (bracketed and (added.content[:1], added.content[-1:]) in (("<", ">"), ("[", "]")))
    }
    control = {**dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)), **added}
    # what stands for unknown characters is the text's own business, unless it is also something else
    unknown = tokenizer.unk_token_id if _knows_not_all(tokenizer) else None
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {token: name for token, name in control.items() if token != unknown or token in others}


@lru_cache(maxsize=1)
def amid(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as it reads what does not begin a text, for those that put a space before what does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = backend.to_str() if backend else ""
    changed = said.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    if changed == said:
        return tokenizer
    from tokenizers import Tokenizer

    other = deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = Tokenizer.from_str(changed).pre_tokenizer
    return other


def _knows_not_all(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text can become the token for what is unknown without naming it; one that reads bytes knows them all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is None or getattr(backend.model, "unk_token", "") is not None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]) -> list[int]:
    """Token ids of a text, none of which is in `control`."""
    ids = encoded(tokenizer, text, split_special_tokens=True)
    if control.keys() & set(ids):
        # not every class of tokenizers knows that option, and it does not hold for tokens not called special
        ids = encoded(tokenizer, broken(text, control))
    return [token for token in ids if token not in control]


def broken(text: str, control: dict[int, str]) -> str:
    """The text with a space inside every control token's name."""
    # the longest first: one name may hold another
    for name in sorted(control.values(), key=len, reverse=True):
        text = text.replace(name, f"{name[:1]} {name[1:]}")
    return text


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, **how: bool) -> list[int]:
    """Token ids of a text without what the tokenizer would add by itself."""
    return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"]) if text else []
