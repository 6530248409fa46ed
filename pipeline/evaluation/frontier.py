"""Where models lie between what training cost (KL to the reference) and what it got: the DPO paper's figure 2 for any runs.

The gain is the mean reward of a judge that gives rewards, on the very responses whose KL is measured; for judges of duels
it is the win rate against the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.judges import IMPLICIT


@dataclass(frozen=True)
class Point:
    """A model on the frontier: what training cost and what it got, each with its interval (mean, low, high)."""

    name: str
    cost: tuple[float, float, float]
    gain: tuple[float, float, float]
    highlighted: bool = True


def gain_of(figures: Mapping[str, Any]) -> str | None:
    """The judge that a frontier is drawn by: the first of texts; None where nothing was judged."""
    names = [name for name, rate in figures.get("judges", {}).items() if rate and name != IMPLICIT]
    return names[0] if names else None


def label_of(figures: Mapping[str, Any], judge: str) -> str:
    """What the vertical axis says."""
    rewarded = judge in figures.get("cost", {}).get("policy", {}).get("reward", {})
    return f"reward, {judge}" if rewarded else f"win rate, {judge}"


def point_of(figures: Mapping[str, Any], judge: str, name: str, model: str = "policy") -> Point | None:
    """A model's point from eval.json; None where its KL or gain was not measured."""
    cost = figures.get("cost", {}).get(model)
    if cost is None:
        return None
    kl = {"mean": 0.0, "low": 0.0, "high": 0.0} if model == "reference" else cost.get("kl")
    gain = cost.get("reward", {}).get(judge) or _win_rate(figures, judge, model)
    if kl is None or gain is None:
        return None
    return Point(name, _three(kl), _three(gain), highlighted=model != "reference")


def points_of(figures: Mapping[str, Any], judge: str) -> list[Point]:
    """Every model of one evaluation."""
    points = [point_of(figures, judge, model, model) for model in figures.get("cost", {})]
    return [point for point in points if point is not None]


def _win_rate(figures: Mapping[str, Any], judge: str, model: str) -> dict[str, float] | None:
    if judge in figures.get("cost", {}).get("policy", {}).get("reward", {}):
        return None  # never rewards and win rates on one axis
    if model == "reference":
        return {"mean": 0.5, "low": 0.5, "high": 0.5}
    if model == "policy":
        rate = figures["judges"].get(judge)
        return rate["rate"] if rate else None
    for one in figures.get("others", []):
        if (one["model"], one["baseline"], one["judge"]) == (model, "reference", judge) and one["rate"]:
            found: dict[str, float] = one["rate"]["rate"]
            return found
    return None


def _three(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["mean"], interval["low"], interval["high"]
