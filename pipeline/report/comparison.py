"""compare.html and compare.md: runs side by side, what they reached, and what keeps them from being compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.artifacts.markdown import markdown_table, plain
from pipeline.artifacts.runs import Run
from pipeline.evaluation.compare import (
    Difference,
    Reached,
    differing_settings,
    frontier_points,
    reached,
)
from pipeline.evaluation.frontier import label_of
from pipeline.evaluation.results import Results, read_results
from pipeline.report import addresses
from pipeline.report.page import environment
from pipeline.report.plots import frontier
from pipeline.report.table import Cell, Section
from pipeline.report.words import leading_judge
from pipeline.report.wrapping import with_names


def comparison_sections(runs: Sequence[Run], compared: Sequence[Difference]) -> list[Section]:
    """The tables of a comparison, for terminal, Markdown and HTML; those without a row are left out. `compared`: see
    `pipeline.evaluation.compare.differences`.
    """
    names = [run.name for run in runs]
    every = [
        Section(
            "Settings that differ", ["setting", *names], differing_settings(runs), source="config.yaml of each run"
        ),
        Section(
            "What they reached",
            ["figure", *names],
            [[figure.name, *_values(figure, names)] for figure in reached(runs)],
            "n: prompts, of held-out figures pairs, of lengths and shares responses.",
            source="in each run judgements.parquet, model = policy, baseline = reference, judge as named; of held-out figures "
            "pairs.parquet, split = eval; of KL and rewards kl.parquet, of responses samples.parquet, model = policy",
        ),
        Section(
            "Prompt by prompt, first minus second",
            ["judge", "first", "second", "compares", "prompts", "difference", "interval, corrected", "p, corrected"],
            [_compared(difference) for difference in compared],
            "Differences of scores on the same prompts against the same reference responses. p: flips of "
            "the differences' signs. Intervals and p-values are corrected alike for all rows of this table (Bonferroni): an "
            "interval leaves out 0 exactly if its p is at most 0.05. A row of two models says nothing about the methods that "
            "made them: another seed could have made others. Runs that differ in train.seed alone are one method; two "
            "methods with several seeds each are compared over seeds and prompts.",
            source="judgements.parquet of both runs, model = policy, baseline = reference, judge as named",
        ),
    ]
    return [section for section in every if section.rows]


def write_comparison(path: Path, runs: Sequence[Run], tables: Sequence[Section], marks: Sequence[str]) -> None:
    """Write the page, and beside it the same for a pull request. `tables`: of `comparison_sections`; `marks`: what keeps the
    runs from being compared, see `pipeline.evaluation.compare.unlike`.
    """
    results = {run.name: read_results(run.eval) or Results(verdict="not evaluated yet") for run in runs}
    points, judge = frontier_points(runs)
    gain = label_of(results[runs[0].name], judge) if judge else ""
    page = (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=list(results),
            verdicts=[(name, _verdict(name, found)) for name, found in results.items()],
            marks=marks,
            frontier=frontier(points, gain) if len(points) >= 2 else None,
            sections=tables,
            view=addresses.PORT,
        )
    )
    durable.write_text(path, page)
    parts = ["\n".join(f"* {plain(mark)}" for mark in marks)]
    for table in tables:
        parts += [f"#### {plain(table.title)}", markdown_table(table.head, table.rows), f"Rows: {plain(table.source)}."]
    durable.write_text(path.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")


def _verdict(run: str, results: Results) -> str:
    leading = leading_judge(results)
    return with_names(results.verdict, {leading: addresses.judged(run, leading)} if leading else {}, whole=True)


def _values(figure: Reached, runs: Sequence[str]) -> list[Cell]:
    return [
        Cell(value, rows="" if value == "-" else _rows(figure, run))
        for run, value in zip(runs, figure.values, strict=True)
    ]


def _rows(figure: Reached, run: str) -> str:
    if figure.judge:
        return addresses.judged(run, figure.judge)
    places = {"pairs.parquet": addresses.pairs(run), "samples.parquet": addresses.samples(run, model="policy")}
    return places.get(figure.file, "")


def _compared(difference: Difference) -> list[str | Cell]:
    mean = difference.paired.difference
    alone = difference.seeds == (1, 1)
    sides = (difference.first, difference.second)
    return [
        difference.judge,
        *(Cell(side, rows=addresses.judged(side, difference.judge) if alone else "") for side in sides),
        "two models" if alone else f"methods of {' and '.join(map(str, difference.seeds))} seeds",
        str(difference.paired.prompts),
        f"{mean.mean:+.3f}",
        f"{mean.low:+.3f} to {mean.high:+.3f}",
        f"{difference.paired.p:.2g}",
    ]
