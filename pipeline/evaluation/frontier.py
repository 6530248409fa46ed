"""Where models lie between what training cost (KL to the reference) and what it got: the DPO paper's figure 2 for any runs.

The gain is the mean reward of a judge that gives rewards, on the very responses whose KL is measured; for judges of duels
it is the win rate against the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.judges import IMPLICIT
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.results import Cost, Results


@dataclass(frozen=True)
class Point:
    """A model on the frontier: what training cost and what it got, each with its interval (mean, low, high)."""

    name: str
    cost: tuple[float, float, float]
    gain: tuple[float, float, float]
    highlighted: bool = True


def gain_of(results: Results) -> str | None:
    """The judge that a frontier is drawn by: the first of texts; None if nothing was judged."""
    return next((name for name in results.judged if name != IMPLICIT), None)


def label_of(results: Results, judge: str) -> str:
    """What the vertical axis says."""
    return f"reward, {judge}" if _gives_rewards(results, judge) else f"win rate, {judge}"


def point_of(results: Results, judge: str, name: str, model: str = "policy") -> Point | None:
    """A model's point from eval.json; None if its KL or gain was not measured."""
    cost = results.cost.get(model)
    if cost is None:
        return None
    kl = Interval(0.0, 0.0, 0.0) if model == "reference" else cost.kl
    gain = cost.reward.get(judge) or _win_rate(results, judge, model)
    if kl is None or gain is None:
        return None
    return Point(name, _three(kl), _three(gain), highlighted=model != "reference")


def points_of(results: Results, judge: str) -> list[Point]:
    """Every model of one evaluation."""
    points = [point_of(results, judge, model, model) for model in results.cost]
    return [point for point in points if point is not None]


def _gives_rewards(results: Results, judge: str) -> bool:
    return judge in results.cost.get("policy", Cost()).reward


def _win_rate(results: Results, judge: str, model: str) -> Interval | None:
    if _gives_rewards(results, judge):
        return None  # never rewards and win rates on one axis
    if model == "reference":
        return Interval(0.5, 0.5, 0.5)
    if model == "policy":
        rate = results.judges.get(judge)
        return rate.rate if rate else None
    for other in results.others:
        if (other.model, other.baseline, other.judge) == (model, "reference", judge) and other.rate:
            return other.rate.rate
    return None


def _three(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high
