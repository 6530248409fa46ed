"""Stage three: generate with policy, reference and further models on held-out prompts, judge, measure KL, report."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import evaluate
from pipeline.report.sections import sections
from pipeline.report.words import notes
from pipeline.report.write import write_reports
from stages import console


def main(config: Config, run: Run) -> None:
    """Evaluate; write eval.json, report.html and report.md; show the same on the terminal, the verdict last."""
    results = write_reports(run, config, evaluate(config, run, console.working))
    for section in sections(results, run.name):
        console.table(section.title, section.head, [list(map(str, row)) for row in section.rows])
    console.say(results.verdict)
    for line in notes(results):
        console.say(f"  {line}")
    console.say(f"report    {run.report}")
    console.answer({"run": run.name, "report": str(run.report), **asdict(results)})
