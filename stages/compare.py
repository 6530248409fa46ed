"""`refscore compare RUN...`: experiments side by side, on the terminal, as a page and for a pull request."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.artifacts.runs import RUNS, Run, existing_runs
from pipeline.errors import ConfigError
from pipeline.evaluation.compare import Difference, differences, differing_settings, unlike
from pipeline.evaluation.results import read_results
from pipeline.report.comparison import comparison_sections, write_comparison
from stages import console


def main(runs: list[Run], page: Path | None) -> None:
    """Print the settings in which `runs` differ and what they reached; write the page (default: data/runs/compare.html)."""
    for run in runs:
        if not run.config.is_file():
            raise ConfigError(f"run {run.name!r} does not exist; there are: {', '.join(existing_runs()) or 'none'}")
    paired, marks = differences(runs), unlike(runs)
    tables = comparison_sections(runs, paired)
    if not tables:
        console.say("the runs have the same settings and no figures yet: run 'refscore eval' for each")
        _answer(runs, paired, marks, None)
        return
    for table in tables:
        console.table(table.title, table.head, [list(map(str, row)) for row in table.rows])
    for mark in marks:
        console.say(f"attention: {mark}")
    path = page or RUNS / "compare.html"
    write_comparison(path, runs, tables, marks)
    console.say(f"page      {path}")
    _answer(runs, paired, marks, path)


def _answer(runs: list[Run], paired: list[Difference], marks: list[str], page: Path | None) -> None:
    results = {run.name: read_results(run.eval) for run in runs}
    console.answer(
        {
            "runs": list(results),
            "settings": {name: dict(zip(results, values, strict=True)) for name, *values in differing_settings(runs)},
            "results": {name: asdict(result) if result else None for name, result in results.items()},
            "differences": [asdict(difference) for difference in paired],
            "attention": marks,
            "page": str(page) if page else None,
        }
    )
