"""Runs side by side: what differs in their settings, what they reached, and whether the difference is more than chance.

Two policies judged on the same prompts against the same reference responses are compared prompt by prompt, which is surer
than two separate win rates; intervals and p-values are corrected alike for the number of comparisons (Bonferroni).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from pipeline.artifacts.runs import Run, finished_stages, read_saved_config
from pipeline.artifacts.schemas import JUDGEMENTS
from pipeline.artifacts.states import about_reference
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.judges import IMPLICIT
from pipeline.evaluation.frontier import Point, gain_of, point_of
from pipeline.evaluation.rates.paired import Paired, paired
from pipeline.evaluation.rates.seeds import over_seeds
from pipeline.evaluation.rates.statistics import Interval
from pipeline.evaluation.rates.winrates import both_orders, prompt_scores
from pipeline.evaluation.results import Cost, Results, read_results
from pipeline.judges.judging import Judgement


@dataclass(frozen=True)
class Difference:
    """One judge's comparison of two runs' policies on their common prompts, corrected for all that are made.

    `seeds`: from how many seeds each side was trained. One each: two trained models are compared. More: two methods.
    """

    judge: str
    first: str
    second: str
    paired: Paired
    seeds: tuple[int, int] = (1, 1)


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of a table: a field that the runs do not share, and its value in each."""
    settings = {run.name: _flat(read_saved_config(run)) for run in runs}
    names = sorted({name for values in settings.values() for name in values})
    return [
        [name, *(str(settings[run.name].get(name, "-")) for run in runs)]
        for name in names
        if len({str(values.get(name)) for values in settings.values()}) > 1
    ]


@dataclass(frozen=True)
class Reached:
    """A figure's value in each run, "-" if it has none; `file`: of the run, has its rows; `judge`: whose they are, if any."""

    name: str
    values: list[str]
    file: str
    judge: str = ""


def reached(runs: Sequence[Run]) -> list[Reached]:
    """The figures that any of these runs has."""
    found = [_figures(read_results(run.eval) or Results()) for run in runs]
    known = {name: figure for figures in found for name, figure in figures.items()}
    return [
        Reached(name, [figures[name].text if name in figures else "-" for figures in found], figure.file, figure.judge)
        for name, figure in known.items()
    ]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Every two methods or runs by every judge, corrected over all that is returned.

    Runs whose settings differ in train.seed alone are one method, compared over its seeds with other methods of several
    seeds; with a run that has no other seed each of them is compared by itself. Runs of different references are not
    compared, nor runs whose reference wrote other responses, but for the implicit judge, who reads none: their win rates are
    against different opponents. `unlike` says so.
    """
    scores = {run.name: _scores(run) for run in runs}
    opponents, references = _opponents(runs), _references(runs)
    compared = []
    for first, second in _sides(list(_methods(runs).values())):
        names = [*first, *second]
        for judge in set.intersection(*(set(scores[name]) for name in names)):
            same = len({references[name] for name in names} - {None}) < 2 and (
                judge == IMPLICIT or len({opponents[name] for name in names}) == 1
            )
            if same and set.intersection(*(set(scores[name][judge]) for name in names)):
                compared.append((judge, second, first))
    found = []
    for judge, one, other in sorted(compared):
        sides = [[scores[name][judge] for name in side] for side in (one, other)]
        result = (
            paired(sides[0][0], sides[1][0], len(compared))
            if len(one) == len(other) == 1
            else over_seeds(sides[0], sides[1], len(compared))
        )
        if result is not None:
            found.append(Difference(judge, ", ".join(one), ", ".join(other), result, (len(one), len(other))))
    return found


def unlike(runs: Sequence[Run]) -> list[str]:
    """Sentences about what keeps these runs from being compared figure by figure; none if nothing does."""
    references, opponents = _references(runs), _opponents(runs)
    sentences = []
    if several := _grouped(references):
        sentences.append(
            f"trained against different references: {several}. Win rates, rewards and KL are against each run's own, so that "
            "no difference between them is tested, and no frontier is drawn"
        )
    elif several := _grouped(opponents):
        sentences.append(
            f"the reference wrote other responses: {several}. Win rates are against different opponents, so that only the "
            "implicit judge is compared prompt by prompt"
        )
    unknown = [run.name for run in runs if run.judgements.is_file() and opponents[run.name] is None]
    if unknown and any(opponents.values()):
        sentences.append(
            f"which responses the reference wrote is not known of {', '.join(unknown)}, so that with other runs only the "
            "implicit judge is compared prompt by prompt: 'refscore eval' again notes them"
        )
    if several := _grouped(_policies(runs)):
        sentences.append(f"start from different models: {several}. What differs is not the training alone")
    return sentences


def frontier_points(runs: Sequence[Run]) -> tuple[list[Point], str | None]:
    """Every run's policy and the reference between KL and gain, and the judge that gives the gain; nothing if the runs have
    different references.
    """
    if _grouped(_references(runs)):
        return [], None
    results = {run.name: read_results(run.eval) or Results() for run in runs}
    judges = [gain_of(result) for result in results.values()]
    judge = judges[0] if judges and len(set(judges)) == 1 else None
    if judge is None:
        return [], None
    points = [point_of(result, judge, name) for name, result in results.items()]
    points.append(point_of(results[runs[0].name], judge, "reference", "reference"))
    return [point for point in points if point is not None], judge


def _references(runs: Sequence[Run]) -> dict[str, str | None]:
    """Digest of the model that each run's data was scored with, whatever the arithmetic; None if it is not known."""
    return {run.name: about_reference(run).get("model") for run in runs}


def _opponents(runs: Sequence[Run]) -> dict[str, str | None]:
    return {run.name: read_about(run.samples).get("keys", {}).get("reference") for run in runs}


def _policies(runs: Sequence[Run]) -> dict[str, str | None]:
    """The model that each run's training began from: its digest where all runs say it, else as it was named."""
    digests = {run.name: finished_stages(run).get("train", {}).get("policy") for run in runs}
    if all(isinstance(digest, str) for digest in digests.values()):
        return digests
    return {run.name: str(_flat(read_saved_config(run)).get("policy.model")) for run in runs}


def _grouped(values: Mapping[str, str | None]) -> str:
    """Runs by what they have, if that differs among those that have it; else nothing."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, value in values.items():
        if value is not None:
            groups[value].append(name)
    if len(groups) < 2:
        return ""
    return "; ".join(f"{', '.join(names)} ({_short(value)})" for value, names in groups.items())


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{32,}", value) else value


def _methods(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Names of the runs that share every setting but the seed of training."""
    methods: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        settings = {name: value for name, value in _flat(read_saved_config(run)).items() if name != "train.seed"}
        methods[repr(sorted(settings.items()))].append(run.name)
    return methods


def _sides(methods: Sequence[Sequence[str]]) -> list[tuple[Sequence[str], Sequence[str]]]:
    """What is compared with what: two methods of several seeds each, else single runs."""
    if len(methods) == 1:
        return [([first], [second]) for first, second in combinations(methods[0], 2)]
    sides: list[tuple[Sequence[str], Sequence[str]]] = []
    for first, second in combinations(methods, 2):
        if min(len(first), len(second)) > 1:
            sides.append((first, second))
        else:
            sides += [([one], [other]) for one in first for other in second]
    return sides


def _scores(run: Run) -> dict[str, dict[str, float]]:
    if not run.judgements.is_file():
        return {}
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for row in read_table(run.judgements, JUDGEMENTS).to_pylist():
        if (row["model"], row["baseline"]) == ("policy", "reference"):
            by_judge[row["judge"]].append(Judgement(**row))
    return {judge: prompt_scores(both_orders(judgements)) for judge, judgements in by_judge.items()}


@dataclass(frozen=True)
class _Figure:
    text: str
    file: str
    judge: str = ""


def _figures(results: Results) -> dict[str, _Figure]:
    """By name, each with its n if that is known."""
    figures = {
        f"win rate, {name}": _Figure(_interval(replace(seen.rate, n=seen.prompts)), "judgements.parquet", name)
        for name, seen in results.judged.items()
    }
    if held_out := results.held_out:
        for name, value in (("reward accuracy", held_out.reward_accuracy), ("mean margin", held_out.mean_margin)):
            figures[f"held-out {name}"] = _Figure(f"{value:.3f}, n = {held_out.pairs}", "pairs.parquet")
    cost = results.cost.get("policy", Cost())
    if cost.kl:
        figures["KL to the reference, nats"] = _Figure(_interval(cost.kl, 2), "kl.parquet")
    for judge, reward in cost.reward.items():
        figures[f"reward at temperature 1, {judge}"] = _Figure(_interval(reward), "kl.parquet")
    if policy := results.responses.get("policy"):
        figures["response tokens, mean"] = _Figure(
            f"{policy.tokens.mean:.1f}, n = {policy.responses}", "samples.parquet"
        )
        figures["responses cut off"] = _Figure(f"{policy.cut_off:.0%}, n = {policy.responses}", "samples.parquet")
    return figures


def _interval(interval: Interval, digits: int = 3) -> str:
    number = "" if interval.n is None else f", n = {interval.n}"
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]{number}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
