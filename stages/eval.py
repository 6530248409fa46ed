"""Stage three: generate with policy, reference and further models on held-out prompts, judge, measure KL, report."""

from __future__ import annotations

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import evaluate
from pipeline.report.write import write_reports
from stages import console, eval_tables


def main(config: Config, run: Run) -> None:
    """Evaluate; write eval.json, report.html and report.md; show the tables."""
    figures = write_reports(run, config, evaluate(config, run, console))
    eval_tables.show(figures)
    console.say(f"report    {run.report}")
