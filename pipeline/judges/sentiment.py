"""How positive an English text is, by the words of two lexicons that know nothing of each other.

`vader`: VADER (Hutto and Gilbert 2014), 7,500 words rated by people, with rules for negation, emphasis and contrast; its compound
score. `textblob`: the lexicon of Pattern (De Smedt and Daelemans 2012) as TextBlob carries it, 2,900 words; the mean polarity of
those found. Both are in [-1, 1] and 0 for texts without a word that they know.

A lexicon may be halved, `:even` or `:odd`: then a judge with one half cannot see the words by which pairs were made with the other.
Words with the same first letters are in the same half, so that no inflection of a word is in both.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable
from functools import cache

Score = Callable[[str], float]

_LETTERS_OF_A_STEM = 4
_LATIN, _LETTER = re.compile(r"[A-Za-z]"), re.compile(r"[^\W\d_]")


@cache
def sentiment(argument: str) -> Score:
    """The score in [-1, 1] for "<lexicon>" or "<lexicon>:<half>" (`pipeline.config.rules.known_lexicon`)."""
    lexicon, _, half = argument.partition(":")
    return _LEXICONS[lexicon](half)


def reads(text: str) -> bool:
    """Whether a lexicon of English can say anything of `text`: it holds no letters, or some of the Latin alphabet."""
    return bool(_LATIN.search(text)) or not _LETTER.search(text)


def in_half(word: str, half: str) -> bool:
    """Whether `word` is in the half "even" or "odd" of all words; every word is in ""."""
    stem = word.casefold()[:_LETTERS_OF_A_STEM]
    return not half or ("even", "odd")[hashlib.sha256(stem.encode()).digest()[0] % 2] == half


def _vader(half: str) -> Score:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    analyzer.lexicon = {word: rating for word, rating in analyzer.lexicon.items() if in_half(word, half)}
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def _textblob(half: str) -> Score:
    import textblob.en

    textblob.en.sentiment.load()
    polarity = copy.copy(textblob.en.sentiment)  # it is TextBlob's own, for whoever else uses it
    for word in [word for word in polarity if not in_half(word, half)]:
        del polarity[word]
    return lambda text: float(polarity(text)[0])


_LEXICONS: dict[str, Callable[[str], Score]] = {"vader": _vader, "textblob": _textblob}
