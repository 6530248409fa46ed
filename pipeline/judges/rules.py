"""Judges that are rules, by name: `rule:<name>` or `rule:<name>=<argument>`. Each gives a response a reward in [0, 1].

Rules see words, not truth. They are quick, free and always of the same opinion, which makes them good second judges.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from pipeline.config.rules import compiled_pattern, known_language, language_identifier, positive_number
from pipeline.judges import marks
from pipeline.judges.judging import Judge, Response, Shown, by_reward
from pipeline.judges.sentiment import reads, sentiment

# None: the rule could not come to an end
Mark = Callable[[str, Response], float | None]


# marks nearer than this are a tie
_TIE = 0.05


def open_rule(text: str, name: str) -> Judge:
    """The judge for "<rule>" or "<rule>=<argument>" under the name `name`."""
    rule_name, _, argument = text.partition("=")
    mark = MARKS[rule_name](argument)

    def reward(items: Sequence[Shown]) -> list[float | None]:
        return [mark(item.prompt.text, item.response) for item in items]

    return by_reward(name, reward, _TIE)


def _complete_and_concise(_: str) -> Mark:
    return lambda prompt, response: marks.marks(prompt, response.text, response.finish_reason).score


def _no_repetition(_: str) -> Mark:
    def mark(_: str, response: Response) -> float | None:
        unreadable = response.text.strip() and not marks.words_of(response.text)
        return None if unreadable else 1.0 - marks.repetition(response.text)

    return mark


def _max_words(argument: str) -> Mark:
    limit = positive_number(argument)
    return lambda _, response: float(0 < marks.words_between_spaces(response.text) <= limit)


def _contains(argument: str) -> Mark:
    text = argument.casefold()
    return lambda _, response: float(text in response.text.casefold())


def _regex(argument: str) -> Mark:
    pattern = compiled_pattern(argument)

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
    language = known_language(argument)

    def mark(_: str, response: Response) -> float:
        probabilities = dict(language_identifier().rank(response.text))
        return round(float(probabilities.get(language, 0.0)), 4) if response.text.strip() else 0.0

    return mark


def _sentiment(argument: str) -> Mark:
    def mark(_: str, response: Response) -> float | None:
        return (1.0 + sentiment(argument)(response.text)) / 2 if reads(response.text) else None

    return mark


def _no_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


# how the rules of `pipeline.config.rules` mark a response, given their argument
MARKS: dict[str, Callable[[str], Mark]] = {
    "complete_and_concise": _complete_and_concise,
    "no_repetition": _no_repetition,
    "max_words": _max_words,
    "contains": _contains,
    "regex": _regex,
    "json_valid": _json_valid,
    "language": _language,
    "sentiment": _sentiment,
}
