"""From responses to groups of token ids: a response that was called good or bad, or a list of them, the best first; or a prompt
alone.

The split is by prompt, as for pairs. A response may have another prompt's response beside it, by which KTO's baseline is
measured: that of the nearest earlier row with another prompt and the same label, so that it is measured on good and bad ones as
the data has them; with any label if there is none, or of the nearest later row. A training row's is of the training split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import DataError
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.kinds import called
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.sources import Sources
from pipeline.pairs.splits import digest_of, digest_with, split_of, split_rule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        groups = self._groups()
        for group in _beside_others(groups, self._encoder.limit) if self._mismatched else groups:
            for item in [group] if isinstance(group, Dropped) else group:
                self.given += 1
                yield item

    def _groups(self) -> Iterator[list[ResponseRow] | Dropped]:
        seen: set[bytes] = set()
        held_out: set[bytes] = set()
        alone = self.wanted == "prompts"
        what = "prompt" if alone else "group"
        for role, unit in self._sources.units(self._encoder.prompts if alone else self._encoder.chosen):
            for found in self._listed(unit) if self.wanted == "lists" else _alone(unit):
                if isinstance(found, Dropped):
                    yield found
                    continue
                prompt, first = digest_of(found[0].prompt_ids), found[0].preference
                if role == "train" and prompt in held_out:
                    yield Dropped(first.source, first.row, "prompt_is_held_out", f"also in {self._data.eval_path}")
                    continue
                group_id = _group_id(found, split_rule(self._data))
                if bytes.fromhex(group_id) in seen:
                    yield Dropped(first.source, first.row, "duplicate", f"{what} {group_id[:12]} was read before")
                    continue
                seen.add(bytes.fromhex(group_id))
                if role == "eval":
                    held_out.add(prompt)
                split = role if self._data.eval_path else split_of(prompt, self._data.eval_fraction)
                kind = PROMPT if alone else RESPONSE
                yield [
                    ResponseRow(group_id, split, kind, one.preference, one.prompt_ids, *(one.responses or [[]]))
                    for one in found
                ]

    def _listed(self, unit: list[Encoded | Dropped]) -> Iterator[list[Encoded] | Dropped]:
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


def _alone(unit: list[Encoded | Dropped]) -> Iterator[list[Encoded] | Dropped]:
    for item in unit:
        yield _as_response(item, RESPONSE) if isinstance(item, Dropped) else [item]


def _as_response(item: Dropped, name: str) -> Dropped:
    """What was said of a pair's chosen response, said of `name`."""
    detail = called(item.detail, name)
    return replace(item, detail=detail if name == RESPONSE or name in detail else f"{name}: {detail}")


def _group_id(group: list[Encoded], rule: str) -> str:
    label = group[0].preference.label
    responses = (response for one in group for response in one.responses)
    lists = [group[0].prompt_ids, *responses, [] if label is None else [int(label)]]
    return digest_with(b"refscore-group\x01", lists, rule)


@dataclass
class _Recent:
    """The last response that was read, and the last before it with another prompt."""

    last: ResponseRow | None = None
    other: ResponseRow | None = None

    def add(self, row: ResponseRow) -> None:
        """Note a row."""
        if self.last is not None and self.last.prompt_ids != row.prompt_ids:
            self.other = self.last
        self.last = row

    def beside(self, row: ResponseRow) -> ResponseRow | None:
        """The newest row with another prompt than `row`."""
        return self.last if self.last is not None and self.last.prompt_ids != row.prompt_ids else self.other


@dataclass
class _Neighbours:
    """Which response of another prompt stands beside a row: memory holds two rows for each split, and two for each label in it."""

    _recent: dict[tuple[str, bool | None], _Recent] = field(default_factory=lambda: defaultdict(_Recent))

    def add(self, row: ResponseRow) -> None:
        """Note a row."""
        # if good and bad take turns, the nearest of all would always be a bad one
        for label in {row.preference.label, None}:
            self._recent[row.split, label].add(row)

    def beside(self, row: ResponseRow) -> ResponseRow | None:
        """The newest row of the same split with another prompt, of the same label if there is one; a held-out row may have one of
        the training split.
        """
        splits = ["train"] if row.split == "train" else ["eval", "train"]
        places = [self._recent[split, label] for split in splits for label in (row.preference.label, None)]
        return next(filter(None, (place.beside(row) for place in places)), None)


def _beside_others(groups: Iterator[list[ResponseRow] | Dropped], limit: int) -> Iterator[list[ResponseRow] | Dropped]:
    """Every group of one response with a mismatched one behind it. DataError if there is none for some."""
    neighbours = _Neighbours()
    # rows at the beginning of a split, all of one prompt, wait for a response to another one
    waiting: dict[str, list[ResponseRow]] = {"train": [], "eval": []}
    for group in groups:
        if isinstance(group, Dropped):
            yield group
            continue
        neighbours.add(group[0])
        waiting[group[0].split].append(group[0])
        for split, rows in waiting.items():
            if rows and neighbours.beside(rows[0]) is not None:
                yield from ([row, _mismatched(row, neighbours.beside(row), limit)] for row in rows)
                waiting[split] = []
    for split, rows in waiting.items():
        if rows:
            first = rows[0].preference
            raise DataError(
                f"{first.source}: all {len(rows)} responses of the {split} split are to one prompt (first: row {first.row}), and "
                "the loss compares with responses to other prompts: give it more prompts, or take train.loss_type=bco, which "
                "needs none"
            )


def _mismatched(row: ResponseRow, other: ResponseRow | None, limit: int) -> ResponseRow:
    """The prompt of `row` with the response of `other`, as long as `limit` tokens allow: nothing is learned from it."""
    if other is None:
        raise ValueError("rows that wait together have one prompt, or find each other")
    said = other.preference
    ids = other.response_ids[: limit - len(row.prompt_ids)]
    cut_off = frozenset(["chosen"]) if len(ids) < len(other.response_ids) else said.cut_off
    preference = replace(row.preference, chosen=said.chosen, calls=said.calls, cut_off=cut_off, label=None, score=None)
    return replace(row, kind=MISMATCHED, preference=preference, response_ids=ids)
