"""From preferences to pairs of token ids: no pair twice, and which split each is in.

The split is by prompt: a prompt is never on both sides, and adding rows moves no other row.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import DataError
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.messages import Message
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.rows import source_digest
from pipeline.pairs.sources import Sources
from pipeline.pairs.tokenised.seen import DigestSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# the responses of a row that belong together: one for each side of a pair, or those of a list
Group = list[Encoded]
SPLITS = ("train", "eval")
KEPT, _HELD_OUT, _TWICE = range(3)
# rows that are looked up together
_AT_ONCE = 2048


@dataclass(frozen=True)
class Selected:
    """A row's responses that are kept, with its id and its split."""

    group_id: str
    split: str
    group: Group


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
        units = self._sources.units(self._encoder.both)
        pairs = ((role, item if isinstance(item, Dropped) else [item]) for role, unit in units for item in unit)
        for found in select(pairs, self._data, "pairs"):
            self.given += 1
            if isinstance(found, Dropped):
                yield found
            else:
                (item,) = found.group
                yield Pair(found.group_id, found.split, item.preference, item.prompt_ids, *item.responses)


class Selection:
    """Which rows of the sources are kept, and in which split each is: no row twice, no prompt of the held-out data in another's."""

    def __init__(self, data: DataConfig, wanted: Data) -> None:
        self._data, self._unit = data, {"pairs": "pair", "prompts": "prompt"}.get(wanted, "group")
        self._seen, self._held_out = DigestSet(), DigestSet()
        # a split's beginning is compared as a whole number, as a fraction of 64 bits is none
        self._below = np.uint64(math.ceil(data.eval_fraction * 2**64))

    def choose(self, role: str, prompts: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What becomes of rows, KEPT or a reason for `dropped`, and which are held out, each [rows].

        `prompts` [rows, 32] and `ids` [rows, 16] are the bytes of digests, `role` is what their source is for.
        """
        known = self._held_out.holds(prompts) if role == "train" else np.zeros(len(ids), bool)
        fresh = np.zeros(len(ids), bool)
        fresh[~known] = self._seen.add(ids[~known])
        if role == "eval":
            self._held_out.add(prompts[fresh])
        chosen = np.where(known, _HELD_OUT, np.where(fresh, KEPT, _TWICE))
        begins = np.ascontiguousarray(prompts[:, :8]).view(">u8")[:, 0]
        held_out = np.full(len(ids), role == "eval") if self._data.eval_path else begins < self._below
        return chosen, held_out

    def dropped(self, reason: int, row_id: bytes, source: str, row: int) -> Dropped:
        """A row that is not kept."""
        if reason == _HELD_OUT:
            return Dropped(source, row, "prompt_is_held_out", f"also in {self._data.eval_path}")
        return Dropped(source, row, "duplicate", f"{self._unit} {row_id.hex()[:12]} was read before")


def select(
    found: Iterable[tuple[str, Group | Dropped]], data: DataConfig, wanted: Data
) -> Iterator[Selected | Dropped]:
    """What is kept of what the sources give, each with what it is for, in order."""
    selection, rule = Selection(data, wanted), split_rule(data)
    for role, of_role in groupby(found, key=itemgetter(0)):
        while batch := [group for _, group in islice(of_role, _AT_ONCE)]:
            digests = [digests_of(group, wanted, rule) for group in batch if not isinstance(group, Dropped)]
            chosen = zip(*selection.choose(role, *as_bytes(digests)), digests, strict=True)
            for group in batch:
                if isinstance(group, Dropped):
                    yield group
                    continue
                reason, held_out, (_, row_id) = next(chosen)
                first = group[0].preference
                if reason == KEPT:
                    yield Selected(row_id.hex(), SPLITS[int(held_out)], group)
                else:
                    yield selection.dropped(reason, row_id, first.source, first.row)


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
    return _prompt_digest(ids_as_bytes(prompt_ids))


def _prompt_digest(ids: bytes) -> bytes:
    return hashlib.sha256(b"refscore-prompt" + ids).digest()


def digests_of(group: Group, wanted: Data, rule: str) -> tuple[bytes, bytes]:
    """What a row is known by: the digest of its prompt (32 bytes), and that of its token ids and the rule of its split (16)."""
    lists = [ids_as_bytes(ids) for ids in (group[0].prompt_ids, *(ids for one in group for ids in one.responses))]
    if wanted == "pairs":
        what = b"refscore-pair\x01"
    else:
        what, label = b"refscore-group\x01", group[0].preference.label
        lists.append(b"" if label is None else ids_as_bytes([int(label)]))
    state = hashlib.sha256(what)
    for ids in lists:
        state.update((len(ids) // 4).to_bytes(8, "little") + ids)
    state.update(rule.encode())
    return _prompt_digest(lists[0]), state.digest()[:16]


def as_bytes(digests: Sequence[tuple[bytes, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Digests of prompts and of rows as arrays of bytes [rows, 32] and [rows, 16]."""
    prompts, ids = (b"".join(column) for column in zip(*digests, strict=True)) if digests else (b"", b"")
    return np.frombuffer(prompts, np.uint8).reshape(-1, 32), np.frombuffer(ids, np.uint8).reshape(-1, 16)


def ids_as_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as numbers of 32 bits, the lowest byte first."""
    numbers = array("i", ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
