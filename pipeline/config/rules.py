"""Rules that judge, by name: what each says, and what its argument must be. `pipeline.judges.rules` does what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class RuleFacts:
    """A row of RULES; `argument` names it, empty if the rule takes none.

    `check` raises ValueError that says what is wrong with an argument. `sees`: what of a response the rule counts, given its
    argument; two rules that count the same thing are not independent. None: it is not known, as with a text of the user's.
    """

    says: str
    argument: str = ""
    check: Callable[[str], object] = str
    sees: Callable[[str], frozenset[str]] | None = None


def rule_problem(text: str) -> str | None:
    """What is wrong with "<name>" or "<name>=<argument>"; None if it can be opened."""
    name, equals, argument = text.partition("=")
    if name not in RULES:
        known = ", ".join(
            f"rule:{known}{f'=<{rule.argument}>' if rule.argument else ''}" for known, rule in RULES.items()
        )
        return f"judge 'rule:{text}' is unknown; the rules are: {known}"
    rule = RULES[name]
    if bool(rule.argument) != bool(equals and argument):
        expectation = f"needs an argument: rule:{name}=<{rule.argument}>" if rule.argument else "takes no argument"
        return f"judge 'rule:{text}' {expectation}"
    try:
        rule.check(argument)
    except ValueError as error:
        return f"judge 'rule:{text}': {error}"
    return None


def positive_number(argument: str) -> int:
    """A whole number above 0. ValueError for anything else."""
    if not argument.isdigit() or int(argument) == 0:
        raise ValueError(f"expected a whole number above 0, got {argument!r}")
    return int(argument)


def compiled_pattern(argument: str) -> Any:
    """A pattern of the package regex, whose searches can be given a time limit. ValueError if it is none."""
    import regex

    try:
        return regex.compile(argument)
    except regex.error as error:
        raise ValueError(f"not a regular expression ({error})") from None


def known_lexicon(argument: str) -> str:
    """A lexicon of sentiment, whole or half. ValueError for others."""
    lexicon, colon, half = argument.partition(":")
    if lexicon not in ("vader", "textblob") or (colon and half not in ("even", "odd")):
        raise ValueError(
            f"expected vader or textblob, or half of their words as in vader:even and vader:odd, got {argument!r}"
        )
    return argument


def known_language(argument: str) -> str:
    """A language code that the identifier knows. ValueError for others."""
    labels = language_identifier().labels
    if argument not in labels:
        raise ValueError(f"{argument!r} is none of the known language codes: {', '.join(labels)}")
    return argument


@cache
def language_identifier() -> Any:
    """py3langid's identifier with probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


_ENDING, _REPETITION, _TOPIC, _LENGTH = "how it ends", "repeated words", "the prompt's words", "length"


def _seen_by_sentiment(argument: str) -> frozenset[str]:
    lexicon, _, half = argument.partition(":")
    halves = [half] if half else ["even", "odd"]
    return frozenset([f"the lexicon of {lexicon}", *(f"the {half} half of words of sentiment" for half in halves)])


def seen_by_rule(text: str) -> frozenset[str] | None:
    """What of a response the rule "<name>" or "<name>=<argument>" counts; None if it is not known."""
    name, _, argument = text.partition("=")
    sees = RULES[name].sees
    return sees(argument) if sees else None


RULES = {
    "complete_and_concise": RuleFacts(
        "ends by itself, does not repeat, speaks to the prompt, is short",
        sees=lambda _: frozenset([_ENDING, _REPETITION, _TOPIC, _LENGTH]),
    ),
    "no_repetition": RuleFacts(
        "share of 4-grams of words that are not repetitions", sees=lambda _: frozenset([_REPETITION])
    ),
    "max_words": RuleFacts(
        "at most so many words, and not empty", "number", positive_number, lambda _: frozenset([_LENGTH])
    ),
    "contains": RuleFacts("holds this text, in any case", "text"),
    "regex": RuleFacts("matches this pattern somewhere", "pattern", compiled_pattern),
    "json_valid": RuleFacts("is JSON, in a code fence or not"),
    "sentiment": RuleFacts("how positive its English words are", "lexicon", known_lexicon, _seen_by_sentiment),
    "language": RuleFacts("how sure it is that the response is in this language", "code", known_language),
}
