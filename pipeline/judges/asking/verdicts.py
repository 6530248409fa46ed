r"""What the text of a reply says about two responses: A, B, a tie, or nothing that can be read.

A verdict is stated by a line or sentence that begins with the word verdict, by \boxed{...}, by [[...]], or by a last line that
is nothing but the verdict; a reply that is JSON states it by its field "verdict" alone. The last statement counts, even if it
cannot be read. A statement that names both sides or none is a tie if it says so, else unreadable; it is never a win. What a
model thinks before its reply is not read: a thought without an end was cut off.
"""

from __future__ import annotations

import re
import unicodedata

from pipeline.judges.asking.structured import stated_in_json

OPENED, CLOSED = "<think>", "</think>"
_STATEMENT = re.compile(
    r"(?:^|(?<=[.!?])[ \t])[ \t*_#`-]*(?:(?:so|thus|hence|therefore|my|the|final|overall)\b,?[ \t]*)*verdict"
    r"(?:[\s*_`]*[:=-]+\s*|[ \t]+is\b:?[ \t]*|[ \t*_`]*\n+\s*|[ \t*_`]+(?=[AB]\W*$))(?P<said>[^\n]*)"
    r"|\\boxed\s*\{(?P<boxed>(?:[^{}\n]|\{[^{}\n]*\})*)\}"
    r"|(?<![\"'`])\[\[(?P<double>[^\[\]\n]*)\]\]",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTES_AND_DASHES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")
_BARE = re.compile(r"[\s*_`]*(?:(?:response |answer )?[AB]|tie|neither)[\s*_`.]*", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:boxed|text(?:bf)?|mathbf|mathrm)\b|[*_`\"'\[\](){}$\\]")
_SENTENCE_END = re.compile(r"[.!?;\n](?=\s|$)")
_REASON = re.compile(r"\b(?:because|since)\b", re.IGNORECASE)
_COMPARED = re.compile(r"(?:response )?([AB])\s*([<>=]+)\s*(?:response )?([AB])", re.IGNORECASE)
_SIDE = re.compile(
    r"(?:the )?(?:winner (?:is )?)?(?:(?:response|answer|assistant|option|candidate|output)[ -]*)?(?P<side>[AB])"
    r"(?P<rest>$|\s*[,-].*|\s+(?:wins|won)\b.*"
    r"|\s+is (?:(?:clearly|slightly|much|far) )?(?:the )?(?:better|best|stronger|preferred|winner)\b.*)",
    re.IGNORECASE,
)
_TIE = re.compile(r"\b(?:tie|ties|tied|draw|neither|both|equal|equally)\b", re.IGNORECASE)
_UNSURE = re.compile(r"\b(?:not|no|never|or|if|unless|hardly|nothing)\b|n't\b", re.IGNORECASE)


def read_verdict(reply: str) -> float | None:
    """The last verdict that a reply states: 1 for A, 0 for B, 0.5 for a tie, None if there is none or it cannot be read."""
    if (stated := stated_in_json(reply)) is not None:
        return _meaning(_visible(stated))
    if cut_off_thinking(reply):
        return None
    text = _visible(reply.rpartition(CLOSED)[2])
    lines = text.rstrip().splitlines()
    if lines and _BARE.fullmatch(lines[-1]):
        return _meaning(lines[-1])
    statements = [next(part for part in found.groups() if part is not None) for found in _STATEMENT.finditer(text)]
    return _meaning(statements[-1]) if statements else None


def cut_off_thinking(reply: str) -> bool:
    """Whether a reply ends inside a thought."""
    return OPENED in _visible(reply.rpartition(CLOSED)[2])


def _visible(text: str) -> str:
    """Compatibility forms, quotes and dashes as plain signs, without marks of direction and spaces of no width."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES_AND_DASHES)
    return "".join(sign for sign in plain if unicodedata.category(sign) not in ("Cf", "Cs"))


def _meaning(statement: str) -> float | None:
    unsure = _UNSURE.search(_REASON.split(statement)[0])
    words = " ".join(_MARKUP.sub(" ", statement).split())
    clause = _REASON.split(_SENTENCE_END.split(words)[0])[0].strip(" ,:.")
    if compared := _COMPARED.fullmatch(clause):
        return _compared(*compared.groups())
    if clause.upper() == "C":
        return 0.5  # what Arena's and FastChat's prompts call a tie
    side, tie = _SIDE.fullmatch(clause), _TIE.search(clause)
    if unsure or (side and tie):
        return None
    if tie:
        return 0.5
    if side is None or _names_another(side["side"], side["rest"]):
        return None
    return float(side["side"].upper() == "A")


def _compared(left: str, sign: str, right: str) -> float | None:
    if left.upper() == right.upper() or len(set(sign)) != 1:
        return None
    return 0.5 if "=" in sign else float((left.upper() == "A") == (">" in sign))


def _names_another(side: str, rest: str) -> bool:
    """Whether the rest names the other side; a small "a" is an article."""
    return re.search(r"\bB\b|\bb\b" if side.upper() == "A" else r"\bA\b|(?:response|answer)[ -]a\b", rest) is not None
