"""Token ids of texts that begin alike, without reading their common beginning more than once.

A fast tokenizer first cuts a text at its special tokens, and reads what lies between them piece by piece. So the ids of a text are
those of its beginning and those of its tail, if the tail begins with a special token that takes nothing from its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class _Cut(NamedTuple):
    """Where the tails of a row's texts begin: `token` stands there, the last of `times` in the prompt."""

    at: int
    token: int
    times: int


class Tails:
    """Tokenises prompts with what follows them; `whole` counts the rows so far of which every text was read from its beginning."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._backend = tokenizer, _backend_of(tokenizer)
        self._tokens = _cutting_tokens(tokenizer) if self._backend else {}
        # the longest first: one may begin with another
        names = sorted(map(re.escape, self._tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(names)) if names else None
        self.whole = 0

    def encode(self, rows: Sequence[list[str]]) -> list[list[list[int]]]:
        """Token ids of the texts of each row: of its prompt, and of what goes on from there."""
        cuts = [self._cut(texts) for texts in rows]
        asked = (
            text if cut is None or not number else text[cut.at :]
            for texts, cut in zip(rows, cuts, strict=True)
            for number, text in enumerate(texts)
        )
        ids = iter(self._ids(list(asked)))
        return [self._joined(list(islice(ids, len(texts))), texts, cut) for texts, cut in zip(rows, cuts, strict=True)]

    def _cut(self, texts: list[str]) -> _Cut | None:
        """The last special token of the prompt, if all texts agree as far as that."""
        prompt, *others = texts
        found = list(self._pattern.finditer(prompt)) if self._pattern and others else []
        if not found:
            return None
        last = found[-1]
        if not all(text.startswith(prompt[: last.end()]) for text in others):
            return None
        return _Cut(last.start(), self._tokens[last[0]], prompt.count(last[0]))

    def _joined(self, ids: list[list[int]], texts: list[str], cut: _Cut | None) -> list[list[int]]:
        prompt, *others = ids
        # a name that is no token where it stands, or a token that no name stands for, would move the cut
        if cut is not None and prompt.count(cut.token) == cut.times and all(tail[0] == cut.token for tail in others):
            head = prompt[: len(prompt) - 1 - prompt[::-1].index(cut.token)]
            return [prompt, *(head + tail for tail in others)]
        self.whole += 1
        return ids if cut is None else self._ids(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._backend is None:
            whole: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
            return whole
        self._backend.encode_special_tokens = False
        # the same ids as the tokenizer's own call gives, without masks and positions in the text
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What a tokenizer's call asks for ids and nothing else; None if a call does more, or there is no such thing."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.split_special_tokens:
        return None
    own = [
        getattr(type(tokenizer), name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus")
    ]
    backend: Tokenizer = tokenizer.backend_tokenizer
    plain = backend.truncation is None and backend.padding is None
    return backend if all(own) and plain else None


def _cutting_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens that are found before anything else is, that take no white space, and that are a part of no other."""
    added = tokenizer.added_tokens_decoder
    names = [token.content for token in added.values()]
    return {
        token.content: number
        for number, token in added.items()
        if token.special
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and sum(token.content in name for name in names) == 1
    }
