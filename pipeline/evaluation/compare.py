"""Runs side by side: what differs in their settings, what they reached, and whether the difference is more than chance.

Two policies judged on the same prompts against the same reference responses are compared prompt by prompt, which is surer
than two separate win rates; intervals and p-values are corrected alike for the number of comparisons (Bonferroni).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pipeline.artifacts.runs import Run, read_saved_config
from pipeline.artifacts.tables import JUDGEMENTS, read_about, read_table
from pipeline.config.judges import IMPLICIT
from pipeline.evaluation.frontier import Point, gain_of, point_of
from pipeline.evaluation.rates.paired import Paired, paired
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import both_orders, prompt_scores
from pipeline.evaluation.results import Cost, Results, read_results
from pipeline.judges.judging import Judgement


@dataclass(frozen=True)
class Difference:
    """One judge's comparison of two runs' policies on their common prompts, corrected for all that are made."""

    judge: str
    first: str
    second: str
    paired: Paired


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table: a field that the runs do not share, and its value in each."""
    settings = {run.name: _flat(read_saved_config(run)) for run in runs}
    names = sorted({name for values in settings.values() for name in values})
    return [
        [name, *(str(settings[run.name].get(name, "-")) for run in runs)]
        for name in names
        if len({str(values.get(name)) for values in settings.values()}) > 1
    ]


def reached(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table: a figure, and its value in each run."""
    figures = {run.name: _figures(read_results(run.eval) or Results()) for run in runs}
    names = dict.fromkeys(name for values in figures.values() for name in values)
    return [[name, *(figures[run.name].get(name, "-") for run in runs)] for name in names]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Every two runs by every judge, corrected over all that is returned.

    Runs whose reference wrote other responses are not compared: their win rates are against different opponents.
    """
    scores = {run.name: _scores(run) for run in runs}
    opponents = {run.name: read_about(run.samples).get("keys", {}).get("reference") for run in runs}
    compared = sorted(
        (judge, second, first)
        for first, second in combinations([run.name for run in runs], 2)
        for judge in scores[first].keys() & scores[second].keys()
        if judge == IMPLICIT or opponents[first] == opponents[second]
        if scores[first][judge].keys() & scores[second][judge].keys()
    )
    results = [
        (judge, one, other, paired(scores[one][judge], scores[other][judge], len(compared)))
        for judge, one, other in compared
    ]
    return [Difference(judge, one, other, found) for judge, one, other, found in results if found is not None]


def frontier_points(runs: Sequence[Run]) -> tuple[list[Point], str | None]:
    """Every run's policy and the reference between KL and gain, and the judge that gives the gain."""
    results = {run.name: read_results(run.eval) or Results() for run in runs}
    judges = [gain_of(result) for result in results.values()]
    judge = judges[0] if judges and len(set(judges)) == 1 else None
    if judge is None:
        return [], None
    points = [point_of(result, judge, name) for name, result in results.items()]
    points.append(point_of(results[runs[0].name], judge, "reference", "reference"))
    return [point for point in points if point is not None], judge


def _scores(run: Run) -> dict[str, dict[str, float]]:
    if not run.judgements.is_file():
        return {}
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for row in read_table(run.judgements, JUDGEMENTS).to_pylist():
        if (row["model"], row["baseline"]) == ("policy", "reference"):
            by_judge[row["judge"]].append(Judgement(**row))
    return {judge: prompt_scores(both_orders(judgements)) for judge, judgements in by_judge.items()}


def _figures(results: Results) -> dict[str, str]:
    figures = {f"win rate, {name}": _interval(rate.rate) for name, rate in results.judged.items()}
    if results.held_out:
        figures["held-out reward accuracy"] = f"{results.held_out.reward_accuracy:.3f}"
        figures["held-out mean margin"] = f"{results.held_out.mean_margin:.3f}"
    cost = results.cost.get("policy", Cost())
    if cost.kl:
        figures["KL to the reference, nats"] = _interval(cost.kl, 2)
    for judge, reward in cost.reward.items():
        figures[f"reward at temperature 1, {judge}"] = _interval(reward)
    policy = results.responses.get("policy")
    if policy:
        figures["response tokens, mean"] = f"{policy.tokens.mean:.1f}"
        figures["responses cut off"] = f"{policy.cut_off:.0%}"
    return figures


def _interval(interval: Interval, digits: int = 3) -> str:
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
