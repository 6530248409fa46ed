"""Markdown that shows any text as it is, tables, and text in which nothing is mark-up; names in pages that others read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# endings of data files, which no repository has
_FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".txt")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with its first column to the left; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def plain(text: object) -> str:
    """`text` so that Markdown shows it as it is: on one line, nothing in it a mark-up or an HTML tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def name_for_others(name: str) -> str:
    """A model or data as a page that may be published names it: of a path on this machine the last part alone."""
    comes_along = name == "-" or name.startswith("embedded:")
    on_the_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and Path(name).suffix.lower() not in _FILES
    if comes_along or (on_the_hub and not Path(name).exists()):
        return name
    return Path(name).expanduser().absolute().name
