"""`refscore compare RUN...`: experiments side by side, on the terminal, as a page and for a pull request."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.artifacts.markdown import markdown_table
from pipeline.artifacts.runs import RUNS, Run, existing_runs
from pipeline.errors import ConfigError
from pipeline.evaluation.compare import Difference, differences, differing_settings, frontier_points, reached, unlike
from pipeline.evaluation.frontier import label_of
from pipeline.evaluation.results import Results, read_results
from pipeline.report.page import environment
from pipeline.report.plots import frontier
from stages import console


def main(runs: list[Run], page: Path | None) -> None:
    """Print the settings in which `runs` differ and what they reached; write the page (default: data/runs/compare.html)."""
    for run in runs:
        if not run.config.is_file():
            raise ConfigError(f"run {run.name!r} does not exist; there are: {', '.join(existing_runs()) or 'none'}")
    head = ["", *(run.name for run in runs)]
    settings, figures, paired = differing_settings(runs), reached(runs), differences(runs)
    if not settings and not figures:
        console.say("the runs have the same settings and no figures yet: run 'refscore eval' for each")
        _answer(runs, settings, paired, None)
        return
    console.table("", head, settings + figures)
    marks = unlike(runs)
    for mark in marks:
        console.say(f"attention: {mark}")
    compared = [_row(difference) for difference in paired]
    if compared:
        console.table(
            "Prompt by prompt, first minus second; intervals and p are corrected for all rows", _HEAD, compared
        )

    points, judge = frontier_points(runs)
    first = read_results(runs[0].eval)
    gain = label_of(first, judge) if judge and first else ""
    path = page or RUNS / "compare.html"
    content = (
        environment()
        .get_template("compare.html.j2")
        .render(
            head=head,
            settings=settings,
            figures=figures,
            compared_head=_HEAD,
            compared=compared,
            frontier=frontier(points, gain) if len(points) >= 2 else None,
            marks=marks,
            verdicts=[
                (run.name, (read_results(run.eval) or Results(verdict="not evaluated yet")).verdict) for run in runs
            ],
        )
    )
    durable.write_text(path, content)
    attention = "\n".join(f"* {mark}" for mark in marks)
    texts = [attention, markdown_table(head, settings + figures), markdown_table(_HEAD, compared)]
    durable.write_text(path.with_suffix(".md"), "\n\n".join(text for text in texts if text) + "\n")
    console.say(f"page      {path}")
    _answer(runs, settings, paired, path)


def _answer(runs: list[Run], settings: list[list[str]], paired: list[Difference], page: Path | None) -> None:
    results = {run.name: read_results(run.eval) for run in runs}
    console.answer(
        {
            "runs": list(results),
            "settings": {name: dict(zip(results, values, strict=True)) for name, *values in settings},
            "results": {name: asdict(result) if result else None for name, result in results.items()},
            "differences": [asdict(difference) for difference in paired],
            "attention": unlike(runs),
            "page": str(page) if page else None,
        }
    )


_HEAD = ["judge", "first", "second", "compares", "prompts", "difference", "95 % interval", "p, corrected"]


def _row(difference: Difference) -> list[str]:
    mean = difference.paired.difference
    return [
        difference.judge,
        difference.first,
        difference.second,
        "two models" if difference.seeds == (1, 1) else f"methods of {' and '.join(map(str, difference.seeds))} seeds",
        str(difference.paired.prompts),
        f"{mean.mean:+.3f}",
        f"{mean.low:+.3f} to {mean.high:+.3f}",
        f"{difference.paired.p:.2g}",
    ]
