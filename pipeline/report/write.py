"""What a run's evaluation leaves for people: eval.json with its words, report.html, report.md."""

from __future__ import annotations

from typing import Any

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import Evaluation
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.words import verdict


def write_reports(run: Run, config: Config, evaluation: Evaluation) -> dict[str, Any]:
    """Write the figures and both reports into the run's directory; returns eval.json's content."""
    side_by_side = evaluation.side_by_side
    figures = {"verdict": verdict(evaluation.figures), **evaluation.figures, "worse": side_by_side[:3]}
    durable.write_json(run.eval, figures)
    write_report(run, config, figures, side_by_side)
    write_markdown(run, config, figures)
    return figures
