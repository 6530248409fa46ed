"""Where text may break over lines: never inside a word or a figure, and a judge's name only where its parts meet.

What comes from elsewhere is escaped here: everything that leaves is markup of our own around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil
from unicodedata import east_asian_width

from markupsafe import Markup, escape

from pipeline.report.side_by_side import visible

# a longer name than this is shortened if it must stay on one line
LONGEST = 34
# what begins a figure: 0.82, -1.5, 12 of 40, (0.1 to 0.2), -
_FIGURE = re.compile(r"[-+(\[]?\d|-$")
# a figure stays whole; its interval and its n may stand below it
_PARTS = re.compile(r"(?<=[)\]],) | (?=[(\[])")
# the signs at which names and paths may go on in the next line, and the longest piece without one
_SEAMS = re.compile(r"[:=/_,.;@-]+(?=\w)|\w{18}(?=\w{4})")
# rem of a character and of a column's padding, in tables
_CHARACTER, _PADDING = 0.57, 1.0
# widths in rem below which a table becomes a list of its rows; page.css.j2 has a rule for each
WIDTHS = [22, 32, 44, 64]


def in_cell(text: str) -> Markup:
    """A table's text: figures whole, names with places to break."""
    if not _FIGURE.match(text):
        return breakable(text)
    parts = _PARTS.split(visible(text))
    if len(parts) == 1 and " " not in text:
        return escape(parts[0])
    return Markup(" ").join(Markup('<span class="whole">{}</span>').format(part) for part in parts)


def breakable(text: str) -> Markup:
    """Text in which a line may also end behind the signs that join a name's parts."""
    shown = visible(text)
    ends = [0, *(match.end() for match in _SEAMS.finditer(shown)), len(shown)]
    return Markup("<wbr>").join(escape(shown[left:right]) for left, right in pairwise(ends))


def on_one_line(name: str) -> Markup:
    """A name that never breaks: shortened if it is long, set smaller if the line is too short for it."""
    shown = visible(name)
    short = shortened(shown)
    title = Markup(' title="{}"').format(shown) if short != shown else ""
    # the sign behind a name stays with it
    return Markup('<span class="name" style="--characters:{}"{}>{}</span>').format(1 + ceil(room(short)), title, short)


def shortened(name: str, longest: int = LONGEST) -> str:
    """A name that takes the room of at most `longest` usual characters, its middle left out if need be."""
    short = name
    for kept in range(len(name) - 1, 0, -1):
        if room(short) <= longest:
            break
        short = f"{name[: (kept + 1) // 2]}...{name[len(name) - kept // 2 :]}"
    return short


def room(text: str) -> float:
    """How many usual characters are about as wide as `text` in a font of unequal widths."""
    return sum(
        2 if east_asian_width(sign) in "WF" else 1.6 if sign in "mwMW@%" else 1.2 if sign.isupper() else 1
        for sign in text
    )


def with_names(text: str, addresses: Mapping[str, str], *, whole: bool = False) -> Markup:
    """Escaped text in which judges' names lead to their rows; `whole`: they never break either. Nor does "95 %"."""
    names = sorted(filter(None, addresses), key=len, reverse=True)
    found = re.split(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", text) if names else [text]
    return Markup("").join(
        Markup('<a href="{}">{}</a>').format(addresses[part], on_one_line(part) if whole else breakable(part))
        if number % 2
        else escape(re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", visible(part)))
        for number, part in enumerate(found)
    )


def stacked_below(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The class of a table that becomes a list of its rows if they do not fit side by side."""
    columns = zip(*(map(str, row) for row in (head, *rows)), strict=True)
    needed = sum(_PADDING + _CHARACTER * max(map(_least, column)) for column in columns)
    return next((f"stacked-{width}" for width in WIDTHS if needed <= width), "stacked")


def _least(text: str) -> int:
    """Characters of the longest piece of a cell's text that stays on one line."""
    pieces = _PARTS.split(text) if _FIGURE.match(text) else _SEAMS.sub(r"\g<0> ", text).split()
    return max(map(len, pieces), default=0)
