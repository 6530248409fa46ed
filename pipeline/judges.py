"""Judges: which of two responses to a prompt is better, by name.

A judge sees duels, two responses in an order, and says how sure it is that the first is better. `judge_both_orders` asks
it in both orders, so a preference for a position shows as disagreement. `implicit` is no judge of texts: it looks at
held-out pairs and asks whether training moved the policy towards the chosen response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline import rules


@dataclass(frozen=True)
class Response:
    """A response as judges see it."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Duel:
    """Two responses to one prompt, in the order in which the judge sees them."""

    prompt: str
    first: Response
    second: Response


@dataclass(frozen=True)
class Comparison:
    """Policy against reference on one prompt (the `sample`-th response of each)."""

    prompt_id: str
    sample: int
    prompt: str
    policy: Response
    reference: Response


@dataclass(frozen=True)
class Judgement:
    """One row of judgements.parquet; `score` is the policy's, None where the judge failed."""

    prompt_id: str
    sample: int
    judge: str
    order: str
    winner: str
    score: float | None


# how likely the first response is the better one, in [0, 1]; 0.5 a tie; None: no verdict could be had
Judge = Callable[[Sequence[Duel]], list[float | None]]

_TIE = 0.05


def _better(first: float, second: float) -> float:
    return 0.5 if abs(first - second) < _TIE else float(first > second)


def _complete_and_concise(duels: Sequence[Duel]) -> list[float | None]:
    def score(prompt: str, response: Response) -> float:
        return rules.marks(prompt, response.text, response.finish_reason).score

    return [_better(score(duel.prompt, duel.first), score(duel.prompt, duel.second)) for duel in duels]


def _no_repetition(duels: Sequence[Duel]) -> list[float | None]:
    return [_better(-rules.repetition(duel.first.text), -rules.repetition(duel.second.text)) for duel in duels]


RULES: dict[str, Judge] = {"complete_and_concise": _complete_and_concise, "no_repetition": _no_repetition}
IMPLICIT = "implicit"
ORDERS = ("policy_first", "reference_first")


def check_judge_name(name: str) -> str | None:
    """What is wrong with a judge's name; None if it is known."""
    if name == IMPLICIT or (name.startswith("rule:") and name.removeprefix("rule:") in RULES):
        return None
    return f"judge {name!r} is unknown; there are: {', '.join([IMPLICIT, *(f'rule:{rule}' for rule in RULES)])}"


def open_judge(name: str) -> Judge:
    """The judge of texts of that name (checked by `check_judge_name` before)."""
    return RULES[name.removeprefix("rule:")]


def judge_both_orders(name: str, judge: Judge, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Two judgements for each comparison, one an order. Equal texts are ties that no judge is asked about."""
    differing = [item for item in comparisons if item.policy != item.reference]
    found = [
        Judgement(item.prompt_id, item.sample, name, order, "tie", 0.5)
        for item in comparisons
        if item.policy == item.reference
        for order in ORDERS
    ]
    for order in ORDERS:
        straight = order == "policy_first"
        duels = [
            Duel(item.prompt, *((item.policy, item.reference) if straight else (item.reference, item.policy)))
            for item in differing
        ]
        for item, first in zip(differing, judge(duels), strict=True):
            score = first if first is None or straight else 1.0 - first
            found.append(Judgement(item.prompt_id, item.sample, name, order, winner_of(score), score))
    return found


def judge_implicitly(prompt_ids: Sequence[str], margins: Sequence[float]) -> list[Judgement]:
    """Reward margins of held-out pairs as judgements: the policy wins where its margin is above 0."""
    seen: dict[str, int] = {}
    found = []
    for prompt_id, margin in zip(prompt_ids, margins, strict=True):
        number = seen[prompt_id] = seen.get(prompt_id, -1) + 1
        score = 0.5 if margin == 0 else float(margin > 0)
        found.append(Judgement(prompt_id, number, IMPLICIT, "pair", winner_of(score), score))
    return found


def winner_of(score: float | None) -> str:
    """The word for a policy's score."""
    if score is None:
        return "failed"
    return "tie" if score == 0.5 else "policy" if score > 0.5 else "reference"
