"""Judges that are rules, by name: `rule:<name>` or `rule:<name>=<argument>`. Each gives a response a reward in [0, 1].

Rules see words, not truth. They are quick, free and always of the same opinion, which makes them good second judges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.judges import rules
from pipeline.judges.judging import Judge, Response, Shown, by_reward

# None: the rule could not come to an end
Mark = Callable[[str, Response], float | None]


@dataclass(frozen=True)
class Rule:
    """`make` turns the argument (empty without one) into a marker, or raises ValueError that says what is wrong."""

    says: str
    make: Callable[[str], Mark]
    argument: str = ""
    # marks nearer than this are a tie
    tie: float = 0.05


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
        wanted = f"needs an argument: rule:{name}=<{rule.argument}>" if rule.argument else "takes no argument"
        return f"judge 'rule:{text}' {wanted}"
    try:
        rule.make(argument)
    except ValueError as error:
        return f"judge 'rule:{text}': {error}"
    return None


def open_rule(text: str, name: str) -> Judge:
    """The judge for "<rule>" or "<rule>=<argument>" under the name `name`."""
    rule_name, _, argument = text.partition("=")
    rule = RULES[rule_name]
    mark = rule.make(argument)

    def reward(items: Sequence[Shown]) -> list[float | None]:
        return [mark(item.prompt.text, item.response) for item in items]

    return by_reward(name, reward, rule.tie)


def _complete_and_concise(_: str) -> Mark:
    return lambda prompt, response: rules.marks(prompt, response.text, response.finish_reason).score


def _no_repetition(_: str) -> Mark:
    return lambda _prompt, response: 1.0 - rules.repetition(response.text)


def _max_words(argument: str) -> Mark:
    limit = _whole_number(argument)
    return lambda _, response: float(0 < len(response.text.split()) <= limit)


def _contains(argument: str) -> Mark:
    wanted = argument.casefold()
    return lambda _, response: float(wanted in response.text.casefold())


def _regex(argument: str) -> Mark:
    import regex

    try:
        pattern = regex.compile(argument)
    except regex.error as error:
        raise ValueError(f"not a regular expression ({error})") from None

    def mark(_: str, response: Response) -> float | None:
        try:
            return float(pattern.search(response.text, timeout=1.0) is not None)
        except TimeoutError:
            return None  # a pattern that explodes on this text

    return mark


def _json_valid(_: str) -> Mark:
    def mark(_: str, response: Response) -> float:
        text = response.text.strip()
        fenced = text.removeprefix("```json").removeprefix("```").removesuffix("```")
        try:
            json.loads(fenced, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0

    return mark


def _language(argument: str) -> Mark:
    if argument not in _identifier().labels:
        raise ValueError(f"{argument!r} is none of the known language codes: {', '.join(_identifier().labels)}")

    def mark(_: str, response: Response) -> float:
        found = dict(_identifier().rank(response.text))
        return round(float(found.get(argument, 0.0)), 4) if response.text.strip() else 0.0

    return mark


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _whole_number(argument: str) -> int:
    if not argument.isdigit() or int(argument) == 0:
        raise ValueError(f"a whole number above 0 is wanted, got {argument!r}")
    return int(argument)


def _no_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


RULES = {
    "complete_and_concise": Rule(
        "ends by itself, does not repeat, speaks to the prompt, is short", _complete_and_concise
    ),
    "no_repetition": Rule("share of 4-grams of words that are not repetitions", _no_repetition),
    "max_words": Rule("at most so many words, and not empty", _max_words, "number"),
    "contains": Rule("holds this text, in any case", _contains, "text"),
    "regex": Rule("matches this pattern somewhere", _regex, "pattern"),
    "json_valid": Rule("is JSON, in a code fence or not", _json_valid),
    "language": Rule("how sure it is that the response is in this language", _language, "code"),
}
