"""Two responses side by side with their differences marked, as HTML in which no model text can act."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

# a word or a sign, with the space after it
_PIECES = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
_LONGEST = 3000
# less in common than this, and marking everything would tell nobody anything
_COMMON = 0.3
# C0 and C1 controls but newline and tab, and what reorders or hides text
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with characters that hide, reorder or end text shown as their code points."""
    return _UNSEEN.sub(lambda match: f"[U+{ord(match.group()):04X}]", text)


def marked(first: str, second: str) -> tuple[Markup, Markup]:
    """Both texts escaped, words that only one of them has in <mark>; see `differing`."""
    left, right = (
        Markup("").join(
            Markup("<mark>{}</mark>").format(text) if differs and not text.isspace() else escape(text)
            for text, differs in side
        )
        for side in differing(first, second)
    )
    return left, right


def differing(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in parts, in order, each with whether only this text has it; whole if they have little in common."""
    texts = visible(first), visible(second)
    whole = tuple([(text, False)] if text else [] for text in texts)
    left, right = (_PIECES.findall(text) for text in texts)
    if max(len(left), len(right)) > _LONGEST:
        return whole[0], whole[1]
    matcher = SequenceMatcher(None, [word.strip() for word in left], [word.strip() for word in right], autojunk=False)
    if matcher.ratio() < _COMMON:
        return whole[0], whole[1]
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for kind, left_from, left_to, right_from, right_to in matcher.get_opcodes():
        for parts, pieces in ((sides[0], left[left_from:left_to]), (sides[1], right[right_from:right_to])):
            if text := "".join(pieces):
                parts.append((text, kind != "equal"))
    return sides
