"""report.md: the figures of report.html for a pull request. Names are escaped; no model text is in it."""

from __future__ import annotations

from pipeline.artifacts import durable
from pipeline.artifacts.markdown import markdown_table, plain
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.evaluation.results import Results
from pipeline.report.sections import sections
from pipeline.report.words import notes


def write_markdown(run: Run, config: Config, results: Results) -> None:
    """Verdict, notes and sections of one run."""
    parts = [
        f"### {plain(run.name)}",
        f"**{plain(results.verdict)}**",
        "\n".join(f"- {plain(line)}" for line in notes(results)),
    ]
    for section in sections(results, run.name):
        parts += [f"#### {plain(section.title)}", markdown_table(section.head, section.rows)]
        parts += [f"Rows: {plain(section.source)}."] if section.source else []
    durable.write_text(run.report_markdown, "\n\n".join(filter(None, [*parts, _settings(config)])) + "\n")


def _settings(config: Config) -> str:
    return (
        f"{plain(config.policy.model)}, {' + '.join(config.train.loss_type)}, beta {config.train.beta:g}; sampled at temperature "
        f"{config.generate.temperature:g}, seed {config.generate.seed}."
    )
