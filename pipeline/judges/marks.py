"""What can be seen of a response without any model: does it end, repeat itself, speak to the prompt, stay short.

These make the demo's preference pairs and serve as judges. They see words, not truth: a fluent false answer scores as
well as a fluent true one.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass

import regex

# scripts that put no space between words are read by their characters
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_LETTERS = r"\p{L}\p{Nd}'"
# marks change a letter; variation selectors make a sign an emoji
_WORD = regex.compile(
    rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    rf"|[[{_LETTERS}]--[{_UNSPACED}]][[{_LETTERS}\p{{Mn}}\p{{Mc}}]--[{_UNSPACED}\p{{Variation_Selector}}]]*",
    regex.V1,
)
_UNSPACED_SIGN = regex.compile(f"[{_UNSPACED}]")
# of Latin, Greek and Cyrillic; Chinese and Japanese; Arabic and Urdu; Devanagari and its neighbours; Armenian; Ethiopic;
# Burmese; Khmer; Tibetan
_ENDS = (
    ".!?:)]\"'\u201d\u2019\u2026\u00bb\u203a"
    "\u3002\uff01\uff1f\uff0e\uff61\u300d\u300f\uff63\uff09\u3011\u300b\u3009\u3015"
    "\u061f\u06d4"
    "\u0964\u0965"
    "\u0589"
    "\u1362\u1367"
    "\u104b"
    "\u17d4\u17d5"
    "\u0f0d\u0f0e"
)
# elsewhere these open a quotation
_QUOTED = regex.compile(r"\u201e[^\u201c]*\u201c$|\u00bb[^\u00ab]*\u00ab$")
# Thai and Lao mark no end of a sentence
_WITHOUT_ENDS = regex.compile(r"[\p{Thai}\p{Lao}]\p{M}*$")
_STOP_WORDS = frozenset(
    """
    a about an and any are as at be been best between but by can could did difference do does explain for from
    get give good had has have help how i if in into is it its just keep make me most much my need of on one or
    our paragraph please sentence sentences short should so some tell than that the their them then there these
    they this three to two up us use want was way we were what when where which who why will with would write
    you your
    """.split()  # noqa: SIM905  # a list of quoted words is harder to read
)
_GRAM = 4
LONG_WORDS = 150


@dataclass(frozen=True)
class Marks:
    """The parts of a response's quality, each in [0, 1], higher is better."""

    complete: float
    distinct: float
    relevant: float
    concise: float

    @property
    def score(self) -> float:
        """Weighted sum in [0, 1]: ending counts most, then not repeating, then speaking to the prompt, then brevity."""
        return 0.4 * self.complete + 0.25 * self.distinct + 0.2 * self.relevant + 0.15 * self.concise


def marks(prompt: str, response: str, finish_reason: str) -> Marks:
    """Marks of a response to `prompt`; `finish_reason` "stop" says that the model ended it itself."""
    return Marks(
        complete=1.0 if finish_reason == "stop" and ends_well(response) else 0.0,
        distinct=max(0.0, 1.0 - 2.0 * repetition(response)),
        relevant=relevance(prompt, response),
        concise=concision(response),
    )


def ends_well(response: str) -> bool:
    """Whether the last line ends as a sentence, a list item or a quotation does; any end does in a script that marks none."""
    text = response.rstrip().rstrip("*_")
    if not text:
        return False
    if text[-1] in _ENDS:
        return text[-1] != ":"
    if _WITHOUT_ENDS.search(text) or _QUOTED.search(text):
        return True
    # a list item or a signature may end without a full stop
    lines = text.splitlines()
    return len(lines) > 1 and words_between_spaces(lines[-1]) <= 12


def repetition(response: str) -> float:
    """Share of the response's 4-grams of words that occurred before in it; 0 for short responses."""
    words = words_of(response)
    grams = [tuple(words[start : start + _GRAM]) for start in range(len(words) - _GRAM + 1)]
    if not grams:
        return 0.0
    return sum(count - 1 for count in Counter(grams).values()) / len(grams)


def relevance(prompt: str, response: str) -> float:
    """How many of the prompt's content words the response takes up; half of them is enough for 1."""
    stems_asked = {stem(word) for word in words_of(prompt)} - {stem(word) for word in _STOP_WORDS}
    if not stems_asked:
        return 1.0
    stems_answered = {stem(word) for word in words_of(response)}
    return min(1.0, 2.0 * len(stems_asked & stems_answered) / len(stems_asked))


def concision(response: str) -> float:
    """1 for up to half of LONG_WORDS words, falling to 0 at LONG_WORDS."""
    share = len(words_of(response)) / LONG_WORDS
    return min(1.0, max(0.0, 2.0 * (1.0 - share)))


def words_of(text: str) -> list[str]:
    """Lower-case words of any script; characters where a script puts no space between words."""
    return list(map(str, _WORD.findall(unicodedata.normalize("NFC", text.lower()))))


def words_between_spaces(text: str) -> int:
    """How many words stand between spaces; where a script puts none between words, its characters count."""
    return sum(len(words_of(part)) if _UNSPACED_SIGN.search(part) else 1 for part in text.split())


def stem(word: str) -> str:
    """A word without its commonest English endings: enough to match 'pots' with 'pot'."""
    for ending in ("'s", "ing", "ies", "es", "ed", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
