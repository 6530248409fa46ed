"""report.md: the figures of report.html for a pull request. Names are escaped; no model text is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.artifacts import durable
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
    for section in sections(results):
        parts += [f"#### {plain(section.title)}", table(section.head, section.rows)]
    durable.write_text(run.report_markdown, "\n\n".join(filter(None, [*parts, _settings(config)])) + "\n")


def _settings(config: Config) -> str:
    return (
        f"{plain(config.policy.model)}, {' + '.join(config.train.loss_type)}, beta {config.train.beta:g}; sampled at temperature "
        f"{config.generate.temperature:g}, seed {config.generate.seed}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with its first column to the left; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def plain(text: object) -> str:
    """`text` so that Markdown shows it as it is: on one line, nothing in it a mark-up or an HTML tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))
