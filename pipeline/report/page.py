"""report.html: one self-contained page for a person, the verdict first.

Model text is hostile input: the template escapes everything, nothing on the page runs, nothing is loaded from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json
from pipeline.artifacts.tables import METRICS, read_table
from pipeline.config.experiment import Config
from pipeline.evaluation.frontier import gain_of, label_of, points_of
from pipeline.report.plots import curves, frontier, win_rates
from pipeline.report.side_by_side import marked, visible
from pipeline.report.words import cautions, leading_judge, second_opinions
from pipeline.training.health import length_words

# more than anybody reads; all are in samples.parquet
_SHOWN = 60


def write_report(run: Run, config: Config, figures: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Render the page from the run's artifacts, `figures` (eval.json) and `samples` (worst first)."""
    metrics = pl.DataFrame(read_table(run.metrics, METRICS))
    leading = leading_judge(figures)
    gain = gain_of(figures)
    points = points_of(figures, gain) if gain else []
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run.name,
            figures=figures,
            second_opinions=second_opinions(figures),
            cautions=cautions(figures),
            leading=leading,
            lead=figures["judges"].get(leading) if leading else None,
            kl=figures["cost"].get("policy", {}).get("kl"),
            samples=samples[:_SHOWN],
            hidden=max(0, len(samples) - _SHOWN),
            config=config.model_dump(mode="json"),
            gate=read_json(run.gate),
            health=_health(run, metrics, figures),
            verified=read_json(run.directory / "verify.json"),
            provenance=read_json(run.provenance),
            curves=[
                ("Loss", curves(metrics, "loss", "loss")),
                ("Reward margin", curves(metrics, "rewards/margins", "margin")),
                ("Reward accuracy", curves(metrics, "rewards/accuracies", "accuracy")),
            ],
            win_rates=win_rates([(name, rate["rate"]) for name, rate in figures["judges"].items() if rate]),
            frontier=frontier(points, label_of(figures, gain)) if gain and len(points) >= 2 else None,
            topics=_topics(figures["topics"]),
        )
    )
    durable.write_text(run.report, page)


def _health(run: Run, metrics: pl.DataFrame, figures: dict[str, Any]) -> list[str]:
    """What looked sick while training, and in the lengths of what was generated since."""
    words = [str(word) for word in read_json(run.health).get("words", [])]
    tokens = {model: seen["tokens"]["mean"] for model, seen in figures["responses"].items()}
    if {"policy", "reference"} <= tokens.keys():
        words += length_words(metrics.to_dicts(), tokens["policy"], tokens["reference"])
    return words


def environment() -> jinja2.Environment:
    """The templates, escaping whatever they are given and refusing names they are not."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # characters that hide or reorder text are shown, wherever they come from
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    found.globals["marked"] = marked
    return found


def _topics(by_judge: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Topics down, judges across; empty where the data names no topics."""
    judges = [name for name, topics in by_judge.items() if len(topics) > 1]
    names = sorted({topic for name in judges for topic in by_judge[name]})
    return {
        "judges": judges,
        "rows": [(topic or "none", [by_judge[name].get(topic) for name in judges]) for topic in names],
    }
