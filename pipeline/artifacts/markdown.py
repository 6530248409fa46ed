"""Markdown that shows any text as it is: tables, and text in which nothing is mark-up."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with its first column to the left; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def plain(text: object) -> str:
    """`text` so that Markdown shows it as it is: on one line, nothing in it a mark-up or an HTML tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))
