"""Stage three: generate with policy, reference and further models on held-out prompts, judge, measure KL, report."""

from __future__ import annotations

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import evaluate
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.words import verdict
from stages import console, eval_tables


def main(config: Config, run: Run) -> None:
    """Evaluate; write eval.json, report.html and report.md; show the tables."""
    evaluation = evaluate(config, run, console)
    side_by_side = evaluation.side_by_side
    figures = {"verdict": verdict(evaluation.figures), **evaluation.figures, "worse": side_by_side[:3]}
    durable.write_json(run.eval, figures)
    write_report(run, config, figures, side_by_side)
    write_markdown(run, config, figures)
    eval_tables.show(figures)
    console.say(f"report    {run.report}")
