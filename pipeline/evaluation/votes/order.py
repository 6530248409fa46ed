"""What people are asked: a run's comparisons in an order, and with sides, that a seed shuffles.

Order and sides are digests of the seed and of what is compared, so they are the same for every voter and after another
evaluation of the same samples, and what is added or goes moves nothing else.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_groups
from pipeline.errors import ConfigError
from pipeline.judges.judging import Compared


@dataclass(frozen=True)
class Ballot:
    """One comparison as a person sees it. `number`: its place in the order, from 0; `first`, `second`: the responses without the
    space around them, as judges see them. Who wrote which is in `model`, `baseline` and `first_is_model`: not to be shown.
    """

    number: int
    prompt_id: str
    sample: int
    model: str
    baseline: str
    prompt: str
    first: str
    second: str
    first_is_model: bool
    topic: str

    @property
    def key(self) -> Compared:
        return self.prompt_id, self.sample, self.model, self.baseline


class OnTexts(Protocol):
    """A vote that knows the texts it was given on."""

    @property
    def texts(self) -> tuple[str, str, str]: ...


V = TypeVar("V", bound=OnTexts)


class Ballots(Sequence[Ballot]):
    """The ballots in their order, each made when it is looked at: the texts stay in Arrow's memory.

    `identical`: how many comparisons are left out because both responses are the same text.
    """

    def __init__(self, model: str, baseline: str, seed: int, own: pa.Table, other: pa.Table) -> None:
        self.model, self.baseline, self.identical = model, baseline, 0
        self._own, self._other = own, other
        drawn = []
        partners = {key: row for row, key in enumerate(_keys(other))}
        responses = zip(_keys(own), own["response"].to_pylist(), strict=True)
        others = other["response"].to_pylist()
        for row, (key, response) in enumerate(responses):
            partner = partners.get(key)
            if partner is None:
                continue
            if response.strip() == others[partner].strip():
                self.identical += 1
                continue
            drawn.append((*_draw(seed, *key, model, baseline), row, partner))
        drawn.sort()
        self._model_first = bytes(first for _, first, _, _ in drawn)
        self._rows = array("q", [row for _, _, row, _ in drawn])
        self._partners = array("q", [partner for _, _, _, partner in drawn])
        self._numbers: dict[tuple[str, int], int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Ballot: ...

    @overload
    def __getitem__(self, number: slice) -> list[Ballot]: ...

    def __getitem__(self, number: int | slice) -> Ballot | list[Ballot]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        at = range(len(self))[number]
        own = {name: column[0].as_py() for name, column in _row(self._own, self._rows[at])}
        against = self._other["response"][self._partners[at]].as_py().strip()
        responses = (own["response"].strip(), against)
        model_first = bool(self._model_first[at])
        first, second = responses if model_first else responses[::-1]
        return Ballot(
            at,
            own["prompt_id"],
            own["sample"],
            self.model,
            self.baseline,
            own["prompt"],
            first,
            second,
            model_first,
            own["topic"] or "",
        )

    def answered(self, given: Mapping[Compared, V]) -> dict[int, V]:
        """Of `given`, what is on these very texts, by the number of the ballot; votes on earlier responses are left out."""
        if not self._numbers:
            keys = _keys(self._own.take(pa.array(self._rows, pa.int64())))
            self._numbers = {key: number for number, key in enumerate(keys)}
        found = {}
        for (prompt_id, sample, *models), vote in given.items():
            number = self._numbers.get((prompt_id, sample))
            if number is None or models != [self.model, self.baseline]:
                continue
            ballot = self[number]
            if vote.texts[0] == ballot.prompt and {*vote.texts[1:]} == {ballot.first, ballot.second}:
                found[number] = vote
        return found


def ballots(run: Run, seed: int = 0, model: str = "policy", baseline: str = "reference") -> Ballots:
    """The comparisons of `model` with `baseline` in samples.parquet, shuffled by the seed; a sequence that is read once.

    Raises DataError without samples, ConfigError if one of the two wrote none, or both are the same.
    """
    if model == baseline:
        raise ConfigError(f"{model!r} cannot be compared with itself: name two models")
    columns = ["prompt_id", "sample", "model", "topic", "prompt", "response"]
    own, other, there = [], [], set()
    for group in read_groups(run.samples, SAMPLES, columns):
        there |= set(group["model"].unique().to_pylist())
        own.append(group.filter(pc.equal(group["model"], model)))
        other.append(group.filter(pc.equal(group["model"], baseline)).select(["prompt_id", "sample", "response"]))
    if missing := [name for name in (model, baseline) if name not in there]:
        raise ConfigError(
            f"{run.samples} holds no responses of {', '.join(missing)}; there are: {', '.join(sorted(there)) or 'none'}"
        )
    return Ballots(model, baseline, seed, pa.concat_tables(own), pa.concat_tables(other))


def _keys(table: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)


def _row(table: pa.Table, number: int) -> Iterator[tuple[str, pa.ChunkedArray]]:
    row = table.slice(number, 1)
    return zip(row.column_names, row.columns, strict=True)


def _draw(seed: int, prompt_id: str, sample: int, model: str, baseline: str) -> tuple[bytes, bool]:
    """A place in the order, and whether the model's response stands first."""
    drawn = hashlib.sha256("\n".join([str(seed), prompt_id, str(sample), model, baseline]).encode()).digest()
    return drawn[:16], bool(drawn[16] & 1)
