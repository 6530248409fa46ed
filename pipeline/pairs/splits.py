"""From preferences to pairs of token ids: no pair twice, and which split each is in.

The split is by prompt: a prompt is never on both sides, and adding rows moves no other row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.experiment import DataConfig
from pipeline.errors import DataError
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.messages import Message
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.rows import source_digest
from pipeline.pairs.sources import Sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """All pairs of an experiment, what was left out, where they came from, and how many rows name a control token, by its name."""

    pairs: list[Pair]
    dropped: list[Dropped]
    formats: dict[str, str]
    digests: dict[str, str]
    control: dict[str, int]


class PairStream:
    """Every row of every source of `data`, tokenised, as it is read: a pair, or why it is none.

    `formats` and `digests` of a source are known once its rows come, `read` and `unread` (columns that nothing reads) once they
    have ended; `control` counts rows whose text names a control token, by its name, `given` what was made of the rows: a ranked
    list may give several pairs.

    Raises ConfigError if the tokenizer cannot do what is asked, DataError if a source cannot be read, CheckError if rows were
    lost on the way.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> None:
        self._sources = Sources(data, "pairs")
        self._data, self._encoder = data, Encoder(data, tokenizer, positions)
        self.formats, self.digests = self._sources.formats, self._sources.digests
        self.read, self.unread = self._sources.read, self._sources.unread
        self.given = 0

    @property
    def control(self) -> dict[str, int]:
        """Rows whose text names a control token, by its name."""
        return self._encoder.control

    def __iter__(self) -> Iterator[Pair | Dropped]:
        self.given = 0
        for item in self._items():
            self.given += 1
            yield item

    def _items(self) -> Iterator[Pair | Dropped]:
        data = self._data
        seen: set[bytes] = set()
        held_out: set[bytes] = set()
        for role, item in ((role, item) for role, unit in self._sources.units(self._encoder.both) for item in unit):
            if isinstance(item, Dropped):
                yield item
                continue
            prompt, part, row = digest_of(item.prompt_ids), item.preference.source, item.preference.row
            if role == "train" and prompt in held_out:
                yield Dropped(part, row, "prompt_is_held_out", f"also in {data.eval_path}")
                continue
            pair_id = _pair_id(item, split_rule(data))
            if bytes.fromhex(pair_id) in seen:
                yield Dropped(part, row, "duplicate", f"pair {pair_id[:12]} was read before")
                continue
            seen.add(bytes.fromhex(pair_id))
            if role == "eval":
                held_out.add(prompt)
            split = role if data.eval_path else split_of(prompt, data.eval_fraction)
            yield Pair(pair_id, split, item.preference, item.prompt_ids, *item.responses)


def build_pairs(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PairSet:
    """All pairs of `data` in memory; `pipeline.pairs.table` keeps them on disk instead.

    Raises DataError if nothing is left to train on (with the reasons), and what `PairStream` raises.
    """
    stream = PairStream(data, tokenizer)
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    for item in stream:
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            pairs.append(item)
    must_train(sum(pair.split == "train" for pair in pairs), data, count_reasons(dropped))
    return PairSet(pairs, dropped, stream.formats, stream.digests, stream.control)


def must_train(left: int, data: DataConfig, reasons: dict[str, int], unit: str = "pair") -> None:
    """Raise DataError if nothing of the training split is left, with what became of the rows."""
    if not left:
        said = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "no rows"
        raise DataError(f"no {unit} is left to train on from {', '.join(data.path)} ({said})")


def count_reasons(dropped: Iterable[Dropped]) -> dict[str, int]:
    """How many rows each reason dropped, most frequent first."""
    counts: dict[str, int] = {}
    for row in dropped:
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def source_digests(data: DataConfig) -> dict[str, str | None]:
    """Digest of every local source that `data` reads now; None if only loading would tell."""
    return {
        name: source_digest(name, data.split) for name in [*([data.eval_path] if data.eval_path else []), *data.path]
    }


def split_rule(data: DataConfig) -> str:
    """The rule that decides a pair's split, as it enters `pair_id`."""
    return "eval_path" if data.eval_path else f"prompt-hash<{data.eval_fraction}"


def prompt_id_of(prompt_ids: Sequence[int]) -> str:
    """Identity of a prompt across tables: 16 hex digits of a digest of its token ids."""
    return digest_of(prompt_ids).hex()[:16]


def prompt_text(prompt: list[Message]) -> str:
    """A prompt for people: the request itself if it is a single one, else every turn with its role."""
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1 and len(prompt) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def digest_of(prompt_ids: Sequence[int]) -> bytes:
    """What a prompt is known by, and its split decided by: a digest of its token ids."""
    return hashlib.sha256(b"refscore-prompt" + np.asarray(prompt_ids, dtype="<i4").tobytes()).digest()


def _pair_id(item: Encoded, rule: str) -> str:
    return digest_with(b"refscore-pair\x01", [item.prompt_ids, *item.responses], rule)


def digest_with(what: bytes, lists: Iterable[Sequence[int]], rule: str) -> str:
    """Identity of a row: 32 hex digits of a digest of its lists of token ids and the rule that decides its split."""
    state = hashlib.sha256(what)
    for ids in lists:
        state.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i4").tobytes())
    state.update(rule.encode())
    return state.hexdigest()[:32]


def split_of(prompt: bytes, fraction: float) -> str:
    """The split of a prompt that is known by `prompt`."""
    return "eval" if int.from_bytes(prompt[:8], "big") < fraction * 2**64 else "train"
