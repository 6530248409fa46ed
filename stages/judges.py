"""`refscore judges`: how far judges agree with each other, with people or with another tool's judge, and what they lean to.

What people voted on the run's samples stands beside its judges as `human`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.rates.agreement import Agreement, Voice, agreement, voice
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.votes.voices import voices_of
from pipeline.judges.annotations import read_votes
from stages import console


def main(run: Run | None, annotations: Path | None, against: Path | None) -> None:
    """Print what the judges of `run`, or of a file of `annotations`, lean to, and their agreement: with `against`, or among
    themselves. Raises DataError if there is nothing to compare.
    """
    if (run is None) == (annotations is None):
        raise ConfigError("say whose verdicts: --run NAME, or --annotations FILE")
    voices = voices_of(run) if run else [voice(str(annotations), read_votes(Path(str(annotations))))]
    if not voices:
        raise DataError("no judge compared texts in this run: add one to `judge` and run 'refscore eval' again")
    other = voice(str(against), read_votes(against)) if against else None
    console.table("What they lean to", _LEANINGS, [_leanings(one) for one in [*voices, *([other] if other else [])]])
    if other:
        _print_against(voices, other)
    elif len(voices) > 1:
        _print_matrix(voices)
    console.say(
        "agreement: the same winner, or a tie; kappa: what of it is beyond chance (Cohen); shares with 95 % intervals over prompts"
    )


_LEANINGS = ["judge", "comparisons", "first wins", "contradicts itself", "prefers the longer", "price of 1,000"]
_AGAINST = ["judge", "common", "prompts", "agreement", "where both decide", "kappa", "prefers the longer", "they do"]


def _leanings(one: Voice) -> list[str]:
    leanings = one.leanings
    return [
        one.name,
        str(len(one.scores)),
        _share(leanings.first_wins),
        _share(leanings.contradictions),
        _interval(leanings.longer),
        "-" if leanings.price is None else f"{leanings.price:.2f}",
    ]


def _print_against(voices: Sequence[Voice], other: Voice) -> None:
    found = {one.name: agreement(one, other) for one in voices}
    if not any(found.values()):
        raise DataError(
            f"{other.name} judges no comparison that {voices[0].name} does: {_why_nothing(voices[0], other)}. A comparison is the "
            "same if prompt and both responses are the same texts"
        )
    rows = [[name, *_against(one)] for name, one in found.items()]
    console.table(f"Against {other.name}", _AGAINST, rows)


def _against(found: Agreement | None) -> list[str]:
    if found is None:
        return ["0", "0", *["-"] * 5]
    intervals = (found.same, found.decided, found.kappa, *found.longer)
    return [str(found.comparisons), str(found.prompts), *map(_interval, intervals)]


def _why_nothing(one: Voice, other: Voice) -> str:
    prompts = {texts[0] for texts in one.scores} & {texts[0] for texts in other.scores}
    return f"{len(prompts)} prompts are in both, with other responses" if prompts else "no prompt is in both"


def _print_matrix(voices: Sequence[Voice]) -> None:
    cells = [["" for _ in voices] for _ in voices]
    for (row, one), (column, other) in combinations(enumerate(voices), 2):
        found = agreement(one, other)
        cells[row][column] = _interval(found.same) if found else "-"
        cells[column][row] = _interval(found.kappa) if found else "-"
    numbers = [str(number) for number in range(1, len(voices) + 1)]
    console.table(
        "Between judges: agreement above the diagonal, kappa below",
        ["judge", *numbers],
        [[f"{number} {one.name}", *row] for number, one, row in zip(numbers, voices, cells, strict=True)],
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
