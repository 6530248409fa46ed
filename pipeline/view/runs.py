"""The list of runs, one run's overview, and runs side by side with one of them as the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.artifacts.runs import Run, read_json, read_saved_config
from pipeline.artifacts.states import about_reference, runs_here, state_of
from pipeline.errors import ConfigError, RefscoreError
from pipeline.evaluation.compare import differences, differing_settings, reached, unlike
from pipeline.evaluation.rates.paired import Paired
from pipeline.evaluation.results import read_results
from pipeline.evaluation.votes import Votes, voters
from pipeline.report.side_by_side import visible
from pipeline.view.comparisons import compared_models
from pipeline.view.pages import stamp


def runs_list() -> dict[str, Any]:
    """Every run here: state, size, key figures, and the reference that its pairs were scored with."""
    found = []
    for run in runs_here():
        state = state_of(run)
        reference = str(about_reference(run).get("model", ""))[:12]
        found.append({**asdict(state), "writer": state.writer is not None, "reference": reference})
    return {"runs": found}


def overview(run: Run) -> dict[str, Any]:
    """What there is to look at in a run, its figures of stage three, and what its files are, to be told of changes."""
    problem, results = "", None
    try:
        results = read_results(run.eval)
    except RefscoreError as error:
        problem = str(error)
    compared: list[tuple[str, str]] = []
    if run.samples.is_file():
        try:
            compared = compared_models(run)
        except RefscoreError as error:
            problem = problem or str(error)
    return {
        "name": run.name,
        "problem": visible(problem),
        "versions": versions(run),
        "comparisons": compared,
        "verdict": results.verdict if results else "",
        "pair_judge": results.pair_judge if results else None,
        "judges": {
            name: {"rate": asdict(rate.rate), "prompts": rate.prompts, "flips": rate.flips, "failed": rate.failed}
            for name, rate in (results.judged if results else {}).items()
        },
        "held_out": asdict(results.held_out) if results and results.held_out else None,
        "verified": read_json(run.directory / "verify.json").get("verdict"),
        "voters": voters(run),
        "votes": _votes(run),
        "generate": _sampled_with(run),
    }


def _votes(run: Run) -> str:
    """Another word after every vote."""
    return " ".join(str(stamp(Votes(run, voter).path)) for voter in voters(run))


def _sampled_with(run: Run) -> dict[str, Any]:
    generate = read_saved_config(run).get("generate")
    names = ("seed", "temperature", "top_p", "max_tokens", "samples")
    return {name: generate[name] for name in names if name in generate} if isinstance(generate, dict) else {}


def versions(run: Run) -> dict[str, str]:
    """A word per file that pages show, another one when the file was replaced: what a page that is open asks for."""
    files = {
        "pairs": run.pairs,
        "dropped": run.dropped,
        "policy_logps": run.policy_logps,
        "metrics": run.metrics,
        "samples": run.samples,
        "judgements": run.judgements,
        "kl": run.kl,
        "eval": run.eval,
        "report": run.report,
    }
    found = {name: stamp(path) for name, path in files.items()}
    return {name: "-".join(map(str, version)) for name, version in found.items() if version}


def side_by_side(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that differ, what was reached, and differences with their intervals; the first run is the baseline.

    Raises ConfigError for fewer than two runs.
    """
    if len(runs) < 2:
        raise ConfigError("name two runs or more to see them side by side")
    baseline = runs[0].name
    # each is of a later run, or runs of several seeds, minus an earlier
    found = [
        {"judge": difference.judge, "run": difference.first, **_figures(difference.paired)}
        for difference in differences(runs)
        if baseline in difference.second.split(", ")
    ]
    return {
        "runs": [run.name for run in runs],
        "unlike": unlike(runs),
        "settings": differing_settings(runs),
        "reached": [[row.name, *row.values] for row in reached(runs)],
        "differences": found,
    }


def _figures(found: Paired) -> dict[str, Any]:
    interval = found.difference
    return {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "p": found.p,
        "prompts": found.prompts,
        "comparisons": found.comparisons,
    }
