"""What an experiment needs of its reference, and what the store lacks of it.

Pairs stream from their sources to a working file and from there to the engine (`pipeline.precompute.score`) and to
pairs.parquet (`pipeline.precompute.join`): memory holds the positions of what is missing, never the pairs. So do responses, for a
loss that learns from these, to responses.parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import MISSING
from pipeline.artifacts.tables import arrays_of, list_column
from pipeline.config.experiment import Config
from pipeline.config.losses import Data, data_of, margins, mismatched, sums_do_not_do
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference, open_reference
from pipeline.errors import ConfigError, DataError, RefscoreError
from pipeline.hardware import return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.pairs.kinds import UNITS
from pipeline.pairs.sources import read_for
from pipeline.pairs.table import GROUP, PairTable
from pipeline.pairs.tokenised.assembly import Assembly, bytes_of
from pipeline.pairs.tokenised.making import How
from pipeline.pairs.tokenised.seen import DigestSet
from pipeline.store.adoption import held_by_adopted, serve_from_adopted
from pipeline.store.identity import IMPORTED, ReferenceIdentity, keys_of
from pipeline.store.store import Store

# seconds: windows follow one another fast, and what others published in these is scored again at most
_LISTED_WITHIN = 60.0
# keys that a plan asks the store for at a time: 100 MB of memory or so
_ASKED_AT_ONCE = 2**19


@dataclass(frozen=True)
class Plan:
    """What an experiment needs of its reference, and what the store lacks of it.

    `keys` has an entry for each side of each row of `pairs`, chosen then rejected of a pair, of which `sequences` differ;
    `missing` are positions in it, ascending, one for each absent key, but for those that references hold which were adopted: by
    their ids these are `adopted`, and are published when scoring begins. `held_as_sums`: sequences of which a sum was imported, and
    no values per token.
    """

    reference: OpenedReference
    data: Data
    pairs: PairTable
    store: Store
    keys: pa.FixedSizeBinaryArray
    sequences: int
    missing: np.ndarray
    adopted: dict[str, np.ndarray]
    held_as_sums: int
    vocabulary: str
    template: str

    @property
    def identity(self) -> ReferenceIdentity:
        """What names the reference's scores."""
        return self.reference.identity

    @property
    def imported(self) -> bool:
        """Whether the scores are others', so that none can be computed."""
        return self.identity.numerics.engine == IMPORTED

    @property
    def absent(self) -> np.ndarray:
        """Positions, ascending, of what has no score under this reference yet: `missing`, and what is `adopted`."""
        return np.sort(np.concatenate([self.missing, *self.adopted.values()]))

    @property
    def missing_tokens(self) -> int:
        """Tokens of what is missing, prompt included."""
        return int(self.pairs.lengths(self.missing).sum(dtype=np.int64))

    @property
    def longest_missing(self) -> int:
        """Tokens of the longest sequence that is missing."""
        return int(self.pairs.lengths(self.missing).max(initial=0))

    @property
    def sides(self) -> tuple[str, ...]:
        """The responses of a row, by name: chosen and rejected of a pair."""
        return self.pairs.sides

    def lines(self, *, scored: bool = True) -> list[str]:
        """Rows, drops, hits, misses and tokens, for people; not `scored`: rows and drops."""
        lines = []
        pairs = self.pairs
        for name, format_name in pairs.formats.items():
            lines.append(f"data      {name}: {format_name}")
        splits = ", ".join(f"{pairs.splits.get(split, 0)} {split}" for split in ("train", "eval"))
        made = sum(pairs.splits.values())
        lines.append(f"rows      {pairs.read} read, {made} {UNITS[self.data]}: {splits}")
        lines += self._of_responses()
        if pairs.cut_off:
            responses = len(self.keys) - self.mismatched
            lines.append(f"cut off   {pairs.cut_off} of {responses} responses, which are given no end token")
        for reason, drop in pairs.drops.items():
            detail = f": {drop.first.detail}" if drop.first.detail else ""
            lines.append(f"dropped   {drop.count} x {reason} (first: {drop.first.source} row {drop.first.row}{detail})")
        if not scored:
            return lines
        lines.append(f"reference {self.identity.reference_id[:12]}  {self.identity.numerics.words}")
        known = self.sequences - len(self.absent)
        if self.imported:
            sums = f", {self.held_as_sums} by their sum alone" if self.held_as_sums else ""
            lines.append(f"store     {self.sequences} sequences: {known} imported{sums}, {len(self.missing)} missing")
        else:
            lines.append(
                f"store     {self.sequences} sequences: {known} hits, "
                + "".join(f"{len(held)} adopted from {adopted[:12]}, " for adopted, held in self.adopted.items())
                + f"{len(self.missing)} misses, {self.missing_tokens} tokens to score"
            )
        return lines

    @property
    def mismatched(self) -> int:
        """Rows that hold the response to another prompt."""
        return len(self.pairs) - sum(self.pairs.splits.values()) if self.data == "responses" else 0

    def _of_responses(self) -> list[str]:
        """What there is of single responses and of lists, for people."""
        if self.data == "lists":
            return [
                f"lists     {len(self.pairs)} responses, {len(self.pairs) / sum(self.pairs.splits.values()):.1f} in a list"
            ]
        if self.data in ("pairs", "prompts"):
            return []
        good, bad = self.pairs.labels.get("train", [0, 0])
        beside = f"; beside {self.mismatched} of them the response to another prompt" if self.mismatched else ""
        return [f"labels    {good} good, {bad} bad to train on{beside}"]

    def not_imported(self) -> str:
        """What to do about sequences without a score, if scores are imported, in a sentence."""
        by, first = self.identity.numerics.imported_by, self.row(int(self.missing[0]) // len(self.sides))
        return (
            f"{len(self.missing)} of {self.sequences} sequences have no score imported by {by!r} (first: {first['source']} row "
            f"{first['source_row']}): import them with 'refscore import', the same configuration and --by, or leave their rows "
            "out of the data, or compute all with reference.engine=vllm and no reference.imported_by. Scores are found under "
            "the same weights, dtype and token ids alone: 'refscore store explain' says what differs"
        )

    def row(self, number: int) -> dict[str, Any]:
        """A row under its names in pairs.parquet or responses.parquet."""
        return self.pairs.row(number)

    def name(self, number: int) -> str:
        """What a row is called if it is at fault."""
        row = self.row(number)
        return f"pair {row['pair_id']}" if self.pairs.of_pairs else f"group {row['group_id']}"

    def request(self, position: int) -> Request:
        """The sequence whose key stands at `position` of `keys`."""
        number, side = divmod(position, len(self.sides))
        row = self.row(number)
        return Request(row["prompt_ids"], row[f"{self.sides[side]}_ids"])


@dataclass(frozen=True)
class Window:
    """Rows that were planned together. `missing`: MISSING's rows, one for each sequence that the store lacks and no earlier window
    had, in the order of the data; `share`: of the sources' bytes that are read by now, 0 to 1.
    """

    missing: pa.Table
    share: float


@dataclass(frozen=True)
class _Answer:
    """What the store says of some windows: how many sequences no earlier window has, and as in `Plan` the others."""

    sequences: int
    missing: np.ndarray
    adopted: dict[str, np.ndarray]
    held_as_sums: int


class Planning:
    """Planning as a stream: what the store lacks of the first rows is known before the last row is read."""

    def __init__(self, config: Config, reference: OpenedReference | None = None) -> None:
        self._config, self.reference = config, reference or open_reference(config.reference)
        self._data = read_for(config.data, data_of(config.train))
        self._assembly = _assembly(config, self.reference, self._data)
        self._reading = self._assembly.windows()
        self._read: list[tuple[int, int, float]] = []
        self._asked, self._new = DigestSet(), list[np.ndarray]()
        self._store = Store(config.reference.store, self.reference.identity)
        self._plan: Plan | None = None
        self._failed: RefscoreError | None = None

    def register(self, run: Path) -> None:
        """Leave word in the store that `run` uses the reference, before anything is read: what is there must stay until it is."""
        self._store.register(run)

    def windows(self) -> Iterator[Window]:
        """Each window as soon as its rows are read; raises what `make_plan` raises."""
        for number, (first, end, share) in enumerate(self._bounds()):
            keys = self._assembly.keys(first, end)
            # a key that an earlier window had is that window's
            new = self._new_of(number)
            missing = new[self._store.lookup(keys.take(pa.array(new)), listed_within=_LISTED_WITHIN).missing]
            groups = [table for _, table in groups_of(self._assembly.table, keys, missing, first)]
            # of every window's rows and digests a little would be kept between what lives on
            return_freed_memory()
            yield Window(pa.concat_tables([MISSING.empty_table(), *groups]), share)

    def plan(self) -> Plan:
        """The whole plan: reads what is left to read, and asks the store for all of it now."""
        if self._plan is None:
            for _ in self._bounds():
                pass
            self._plan = self._planned()
        return self._plan

    def _bounds(self) -> Iterator[tuple[int, int, float]]:
        """The bounds of every window, those that are read already first."""
        number = 0
        while number < len(self._read) or self._has_more():
            yield self._read[number]
            number += 1

    def _has_more(self) -> bool:
        if self._failed:
            raise self._failed
        try:
            more = list(islice(self._reading, 1))
        except RefscoreError as error:
            self._failed = error
            raise
        self._read += more
        return bool(more)

    def _planned(self) -> Plan:
        config, reference, pairs = self._config, self.reference, self._assembly.table
        _must_say_margins(config, pairs)
        asked = self._ask()
        plan = Plan(
            reference=reference,
            data=self._data,
            pairs=pairs,
            store=self._store,
            keys=self._assembly.keys(0, len(pairs)),
            sequences=sum(answer.sequences for answer in asked),
            missing=_joined([answer.missing for answer in asked]),
            adopted={
                by: _joined([answer.adopted[by] for answer in asked if by in answer.adopted])
                for by in dict.fromkeys(by for answer in asked for by in answer.adopted)
            },
            held_as_sums=sum(answer.held_as_sums for answer in asked),
            vocabulary=vocabulary_digest(reference.tokenizer),
            template=chat_template_digest(reference.tokenizer),
        )
        if plan.held_as_sums and config.train.objective == "preference" and config.train.ld_alpha is not None:
            raise ConfigError(sums_do_not_do(f"{plan.held_as_sums} of {plan.sequences} imported scores"))
        # what reading has left behind would stand beside the engine
        del asked
        return_freed_memory()
        return plan

    def _ask(self) -> list[_Answer]:
        """What the store has of the table now, asked for some windows at a time."""
        answers, listed_within = list[_Answer](), 0.0
        begin, new = 0, list[np.ndarray]()
        for number, (first, end, _) in enumerate(self._read):
            new.append(self._new_of(number) + len(self._assembly.table.sides) * (first - begin))
            if sum(map(len, new)) >= _ASKED_AT_ONCE or number == len(self._read) - 1:
                answers.append(self._answer(begin, end, np.concatenate(new), listed_within))
                begin, new, listed_within = end, [], _LISTED_WITHIN
        return answers

    def _answer(self, begin: int, end: int, new: np.ndarray, listed_within: float) -> _Answer:
        keys, sides = self._assembly.keys(begin, end), len(self._assembly.table.sides)
        lookup = self._store.lookup(keys.take(pa.array(new)), listed_within=listed_within)
        missing = new[lookup.missing]
        adopted = _adopted(self._store, self._assembly.table, keys, missing, begin)
        missing = np.setdiff1d(missing, _joined(list(adopted.values())), assume_unique=True)
        offset = sides * begin
        return _Answer(
            len(new),
            missing + offset,
            {by: positions + offset for by, positions in adopted.items()},
            len(lookup.held_as_sums),
        )

    def _new_of(self, number: int) -> np.ndarray:
        """Which positions of a window hold keys that none before it holds."""
        while number >= len(self._new):
            first, end, _ = self._read[len(self._new)]
            self._new.append(np.packbits(self._asked.add(bytes_of(self._assembly.keys(first, end)))))
        first, end, _ = self._read[number]
        count = len(self._assembly.table.sides) * (end - first)
        positions: np.ndarray = np.flatnonzero(np.unpackbits(self._new[number], count=count))
        return positions


def make_plan(config: Config, reference: OpenedReference | None = None) -> Plan:
    """Read the data, tokenise, and ask the store; loads no model.

    `reference`: `config.reference`, if it was opened before. Raises DataError if the data cannot be read, gives nothing to train
    on, or does not say what the loss reads of it; ConfigError if the reference or its tokenizer cannot be used, or if the loss
    weighs tokens of which only sums were imported.
    """
    return Planning(config, reference).plan()


def _assembly(config: Config, reference: OpenedReference, data: Data) -> Assembly:
    """What the training learns from, as it is read."""
    reference_id = reference.identity.reference_id
    how = How(
        partial(load_tokenizer, reference.paths.merged, reference.config),
        position_limit(reference.paths.base),
        reference_id,
        partial(keys_of, reference_id),
    )
    beside = data == "responses" and mismatched(config.train)
    return Assembly(config.data, data, how, reference.tokenizer, mismatched=beside)


def _adopted(
    store: Store, pairs: PairTable, keys: pa.FixedSizeBinaryArray, absent: np.ndarray, begin: int
) -> dict[str, np.ndarray]:
    """Those of the positions `absent` that adopted references hold, by their ids; `keys` are those of the rows from `begin` on."""

    def keys_under(reference_id: str, positions: np.ndarray) -> pa.FixedSizeBinaryArray:
        found = groups_of(pairs, keys, positions, begin)
        return pa.concat_arrays([keys_of(reference_id, missing) for _, missing in found])

    return held_by_adopted(store, absent, keys_under)


def _joined(positions: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *positions])


def groups_of(
    pairs: PairTable, keys: pa.FixedSizeBinaryArray, positions: np.ndarray, begin: int = 0
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Row group by row group: those of `positions` in it, and their rows of MISSING. `keys`, of which these are positions,
    ascending, are those of the rows from `begin` on.
    """
    sides = len(pairs.sides)
    groups, begins = np.unique(positions // max(1, sides * GROUP), return_index=True)
    for group, here in zip(groups.tolist(), np.split(positions, begins[1:]), strict=False):
        first = begin + group * GROUP
        table = pairs.rows(first, min(first + GROUP, len(pairs)), pairs.ids)
        prompts, *responses = (arrays_of(table, name) for name in pairs.ids)
        places = [divmod(position, sides) for position in (here - sides * group * GROUP).tolist()]
        columns = [
            keys.take(pa.array(here)),
            list_column([prompts[row] for row, _ in places], MISSING.field("prompt_ids").type),
            list_column([responses[side][row] for row, side in places], MISSING.field("response_ids").type),
        ]
        yield here, pa.table(columns, schema=MISSING)


def serve_adopted(plan: Plan) -> None:
    """Publish what adopted references hold of the plan; what turns out damaged is missing the next time."""
    adopted = np.sort(np.concatenate([plan.missing[:0], *plan.adopted.values()]))
    if len(adopted):
        for _, missing in groups_of(plan.pairs, plan.keys, adopted):
            serve_from_adopted(plan.store, missing)
        plan.store.finish()


def _must_say_margins(config: Config, pairs: PairTable) -> None:
    if (names := margins(config.train)) and pairs.margins < len(pairs):
        raise DataError(
            f"{len(pairs) - pairs.margins} of {len(pairs)} pairs do not say how much better chosen is, from which "
            f"{', '.join(names)} learns: give every row a margin, or a chosen_score and a rejected_score, or take ranked data"
        )
