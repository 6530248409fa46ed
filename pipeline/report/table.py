"""What a table of a report is; `pipeline.report.sections` lists them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.rates.statistics import Interval


@dataclass(frozen=True)
class Cell:
    """A cell whose text says something good ("up") or bad ("down")."""

    text: str
    tone: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Section:
    """A table with its title; `note` explains it to a reader of the page, `figure` names the picture that goes with it."""

    title: str
    head: list[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    figure: str = ""


def between(interval: Interval, digits: int = 3) -> str:
    """An interval's ends in words."""
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"
