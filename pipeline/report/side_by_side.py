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
    """Both texts escaped, words that only one of them has in <mark>; unmarked if they have little in common."""
    left, right = (_PIECES.findall(visible(text)) for text in (first, second))
    if max(len(left), len(right)) > _LONGEST:
        return escape(visible(first)), escape(visible(second))
    matcher = SequenceMatcher(None, [word.strip() for word in left], [word.strip() for word in right], autojunk=False)
    if matcher.ratio() < _COMMON:
        return escape(visible(first)), escape(visible(second))
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, left_from, left_to, right_from, right_to in matcher.get_opcodes():
        for parts, pieces in ((sides[0], left[left_from:left_to]), (sides[1], right[right_from:right_to])):
            text = "".join(pieces)
            if text:
                parts.append(
                    escape(text) if kind == "equal" or text.isspace() else Markup("<mark>{}</mark>").format(text)
                )
    return Markup("").join(sides[0]), Markup("").join(sides[1])
