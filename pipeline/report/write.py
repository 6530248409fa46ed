"""What a run's evaluation leaves for people: eval.json with its words, report.html, report.md."""

from __future__ import annotations

from dataclasses import replace

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.evaluate import Evaluation
from pipeline.evaluation.results import Results, write_results
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.words import verdict


def write_reports(run: Run, config: Config, evaluation: Evaluation) -> Results:
    """Write eval.json and both reports into the run's directory; returns the results with their verdict."""
    results = replace(evaluation.results, verdict=verdict(evaluation.results))
    write_results(run.eval, results)
    write_report(run, config, results, evaluation.side_by_side, evaluation.gains)
    write_markdown(run, config, results)
    return results
