"""Preference pairs from several scored responses to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """Which response is preferred to which, as positions in the scored list, and by how much."""

    chosen: int
    rejected: int
    margin: float


def best_and_worst(scores: Sequence[float], margin: float) -> Choice | None:
    """The highest- against the lowest-scored response; None where they are nearer than `margin` (a near-tie).

    Among equal scores the earlier response is taken, so the choice depends on nothing but the scores.
    """
    if len(scores) < 2:
        return None
    chosen = max(range(len(scores)), key=lambda at: (scores[at], -at))
    rejected = min(range(len(scores)), key=lambda at: (scores[at], at))
    distance = scores[chosen] - scores[rejected]
    return Choice(chosen, rejected, distance) if distance >= margin else None
