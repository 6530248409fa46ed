"""What a table of a report is; `pipeline.report.sections` lists them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.evaluation.rates.statistics import Interval
from pipeline.report.wrapping import stacked_below

# between the figures of a cell that has several
BETWEEN = " / "
# what a cell's tone looks like if colours are not seen
ARROWS = {"up": "\u25b2", "down": "\u25bc", "above": "\u25b2"}


@dataclass(frozen=True)
class Cell:
    """A cell whose text says something good ("up"), bad ("down") or better than the policy ("above"), and where its rows are:
    an address, or one for each of the figures that stand in it.
    """

    text: str
    tone: str = ""
    rows: str | Sequence[str] = ""

    def __str__(self) -> str:
        return self.text

    @property
    def several(self) -> bool:
        return not isinstance(self.rows, str)

    def figures(self) -> Iterator[tuple[str, str]]:
        """The parts of the text, each with its address or an empty one."""
        if isinstance(self.rows, str):
            yield self.text, self.rows
        else:
            yield from zip(self.text.split(BETWEEN), self.rows, strict=True)


@dataclass(frozen=True)
class Section:
    """A table with its title; `note` explains it to a reader of the page, `figure` names the picture that goes with it,
    `source` the file and the filter of the rows that its figures are made of.
    """

    title: str
    head: list[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    figure: str = ""
    source: str = ""

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    @property
    def stacked(self) -> str:
        return stacked_below(self.head, self.rows)


def between(interval: Interval, digits: int = 3) -> str:
    """An interval's ends in words."""
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


def with_interval(interval: Interval, digits: int = 3) -> str:
    """A mean, its interval, and of how many it is if that is known."""
    number = "" if interval.n is None else f", n = {interval.n}"
    return f"{interval.mean:.{digits}f} ({between(interval, digits)}){number}"
