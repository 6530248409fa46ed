"""From responses to groups of token ids: a response that was called good or bad, or a list of them, the best first; or a prompt
alone.

The split is by prompt, as for pairs. A response may have another prompt's response beside it, by which KTO's baseline is
measured: that of the nearest earlier row with another prompt and the same label, so that it is measured on good and bad ones as
the data has them; with any label if there is none, or of the nearest later row. A training row's is of the training split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import DataError
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.kinds import called
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.sources import Sources
from pipeline.pairs.splits import Group, digest_of, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

RESPONSE, MISMATCHED, PROMPT = "response", "mismatched", "prompt"


@dataclass(frozen=True)
class ResponseRow:
    """One row of responses.parquet before its scores are known; its response stands as the preference's chosen one.

    A prompt alone has no `response_ids`.
    """

    group_id: str
    split: str
    kind: str
    preference: Preference
    prompt_ids: list[int]
    response_ids: list[int]


class ResponseStream:
    """Every row of every source of `data`, tokenised, as it is read: the responses of a group one after the other, or why there
    are none. `wanted`: "responses", each a group of its own, with a mismatched one beside it if `mismatched`; "lists"; "prompts".

    What it knows of its sources is what `pipeline.pairs.splits.PairStream` does, and it raises the same; and DataError if all
    rows have one prompt, so that no response is another prompt's.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        positions: int | None = None,
        *,
        wanted: Data = "responses",
        mismatched: bool = False,
    ) -> None:
        self._sources = Sources(data, wanted)
        self._data, self._encoder = data, Encoder(data, tokenizer, positions)
        self.wanted, self._mismatched = wanted, mismatched
        self.formats, self.digests = self._sources.formats, self._sources.digests
        self.read, self.unread = self._sources.read, self._sources.unread
        self.given = 0

    @property
    def control(self) -> dict[str, int]:
        """Responses whose row names a control token in its text, by its name."""
        return self._encoder.control

    def __iter__(self) -> Iterator[ResponseRow | Dropped]:
        self.given = 0
        for item in self._beside_others() if self._mismatched else self._rows():
            self.given += 1
            yield item

    def _rows(self) -> Iterator[ResponseRow | Dropped]:
        for group in self._groups():
            yield from [group] if isinstance(group, Dropped) else group

    def _beside_others(self) -> Iterator[ResponseRow | Dropped]:
        """Every response with a mismatched one behind it."""
        neighbours = Neighbours[ResponseRow]()
        for group in self._groups():
            if isinstance(group, Dropped):
                yield group
                continue
            (row,) = group
            said = row.preference
            told = Told(digest_of(row.prompt_ids), row.split, said.label, said.source, said.row, row)
            for one, other in neighbours.add(told):
                yield one.item
                yield _mismatched(one.item, other.item, self._encoder.limit)
        neighbours.end()

    def _groups(self) -> Iterator[list[ResponseRow] | Dropped]:
        wanted = self.wanted
        units = self._sources.units(self._encoder.of(wanted))
        found = ((role, group) for role, unit in units for group in groups_of(unit, wanted))
        for one in select(found, self._data, wanted):
            if isinstance(one, Dropped):
                yield one
                continue
            kind = PROMPT if wanted == "prompts" else RESPONSE
            yield [
                ResponseRow(one.group_id, one.split, kind, said.preference, said.prompt_ids, *(said.responses or [[]]))
                for said in one.group
            ]


def groups_of(unit: list[Encoded | Dropped], wanted: Data) -> Iterator[Group | Dropped]:
    """What one row becomes for a loss that learns from `wanted`: the responses that belong together, or why there are none."""
    if wanted == "pairs":
        yield from (item if isinstance(item, Dropped) else [item] for item in unit)
    elif wanted == "lists":
        yield from _listed(unit)
    else:
        yield from (_as_response(item, RESPONSE) if isinstance(item, Dropped) else [item] for item in unit)


def _listed(unit: list[Encoded | Dropped]) -> Iterator[Group | Dropped]:
    """A list without what cannot be in it, or why nothing of it is left."""
    kept: list[Encoded] = []
    left_out: list[Dropped] = []
    for number, item in enumerate(unit, 1):
        if isinstance(item, Dropped):
            left_out.append(item if len(unit) == 1 else _as_response(item, f"response {number}, from the best"))
        elif any(item.responses[0] == other.responses[0] for other in kept):
            where = (item.preference.source, item.preference.row)
            left_out.append(Dropped(*where, "identical_responses", f"response {number}: equal token ids"))
        else:
            kept.append(item)
    scores = {item.preference.score for item in kept}
    if len(kept) > 1 and len(scores) > 1:
        yield kept
        yield from left_out
    elif len(kept) > 1:
        # of the others, the best or the worst was left out
        first, words = kept[0].preference, f"the {len(kept)} responses that are left have one score"
        why = "; ".join(f"{item.reason} {item.detail}".strip() for item in left_out)
        yield Dropped(first.source, first.row, "equal_scores", f"{words} ({why})")
    elif not kept and len({item.reason for item in left_out}) == 1:
        yield left_out[0]
    else:
        why = "; ".join(f"{item.reason} {item.detail}".strip() for item in left_out)
        yield Dropped(left_out[0].source, left_out[0].row, "fewer_than_two_responses", why)


def _as_response(item: Dropped, name: str) -> Dropped:
    """What was said of a pair's chosen response, said of `name`."""
    detail = called(item.detail, name)
    return replace(item, detail=detail if name == RESPONSE or name in detail else f"{name}: {detail}")


@dataclass(frozen=True)
class Told(Generic[Item]):
    """A response as its neighbours see it: its prompt's digest, split and label, where it was read, and the response itself."""

    prompt: bytes
    split: str
    label: bool | None
    source: str
    row: int
    item: Item


class _Recent(Generic[Item]):
    """The last response that was read, and the last before it with another prompt."""

    def __init__(self) -> None:
        self._last: Told[Item] | None = None
        self._other: Told[Item] | None = None

    def add(self, told: Told[Item]) -> None:
        """Note a response."""
        if self._last is not None and self._last.prompt != told.prompt:
            self._other = self._last
        self._last = told

    def beside(self, told: Told[Item]) -> Told[Item] | None:
        """The newest response to another prompt."""
        return self._last if self._last is not None and self._last.prompt != told.prompt else self._other


class Neighbours(Generic[Item]):
    """Which response to another prompt stands beside each: memory holds two for each split, and two for each label in it, beside
    those at the beginning of a split, all to one prompt, that wait for a response to another one.
    """

    def __init__(self) -> None:
        self._recent: dict[tuple[str, bool | None], _Recent[Item]] = defaultdict(_Recent)
        self._waiting: dict[str, list[Told[Item]]] = {"train": [], "eval": []}

    def add(self, told: Told[Item]) -> list[tuple[Told[Item], Told[Item]]]:
        """Note a response; those that found one beside them now, each with that."""
        # if good and bad take turns, the nearest of all would always be a bad one
        for label in {told.label, None}:
            self._recent[told.split, label].add(told)
        self._waiting[told.split].append(told)
        found = []
        for split, rows in self._waiting.items():
            if rows and self._beside(rows[0]) is not None:
                found += [(row, other) for row in rows if (other := self._beside(row)) is not None]
                self._waiting[split] = []
        return found

    def end(self) -> None:
        """Raise DataError if a response still waits."""
        for split, rows in self._waiting.items():
            if rows:
                first = rows[0]
                raise DataError(
                    f"{first.source}: all {len(rows)} responses of the {split} split are to one prompt (first: row {first.row}), "
                    "and the loss compares with responses to other prompts: give it more prompts, or take train.loss_type=bco, "
                    "which needs none"
                )

    def _beside(self, told: Told[Item]) -> Told[Item] | None:
        """The newest response of the same split to another prompt, of the same label if there is one; beside a held-out one there
        may be one of the training split.
        """
        splits = ["train"] if told.split == "train" else ["eval", "train"]
        places = [self._recent[split, label] for split in splits for label in (told.label, None)]
        return next(filter(None, (place.beside(told) for place in places)), None)


def _mismatched(row: ResponseRow, other: ResponseRow, limit: int) -> ResponseRow:
    """The prompt of `row` with the response of `other`, as long as `limit` tokens allow: nothing is learned from it."""
    said = other.preference
    ids = other.response_ids[: limit - len(row.prompt_ids)]
    cut_off = frozenset(["chosen"]) if len(ids) < len(other.response_ids) else said.cut_off
    preference = replace(row.preference, chosen=said.chosen, calls=said.calls, cut_off=cut_off, label=None, score=None)
    return replace(row, kind=MISMATCHED, preference=preference, response_ids=ids)
