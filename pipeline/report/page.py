"""report.html: one self-contained page for a person, the verdict first.

Model text is hostile input: the template escapes everything, nothing on the page runs, nothing is loaded from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import polars as pl
from markupsafe import Markup

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json
from pipeline.artifacts.schemas import DROPPED, METRICS
from pipeline.artifacts.tables import read_table
from pipeline.config.experiment import Config
from pipeline.evaluation.baselines import GainByLength
from pipeline.evaluation.frontier import gain_of, label_of, points_of
from pipeline.evaluation.results import Cost, Results, SideBySide
from pipeline.report import addresses
from pipeline.report.plots import curves, frontier, scatter, win_rates
from pipeline.report.sections import sections
from pipeline.report.side_by_side import marked, visible
from pipeline.report.table import ARROWS
from pipeline.report.words import leading_judge, notes
from pipeline.report.wrapping import WIDTHS, breakable, in_cell, with_names
from pipeline.training.checks.health import length_words

# more than anybody reads; all are in samples.parquet
_SHOWN = 60


def write_report(
    run: Run, config: Config, results: Results, samples: Sequence[SideBySide], gains: Mapping[str, GainByLength]
) -> None:
    """Render the page from the run's artifacts, `results` (eval.json), `samples` (worst first) and `gains` (by judge)."""
    metrics = pl.DataFrame(read_table(run.metrics, METRICS))
    leading = leading_judge(results)
    judges = {name: addresses.judged(run.name, name) for name in results.judged}
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run.name,
            results=results,
            verdict=with_names(results.verdict, judges, whole=True),
            notes=[with_names(line, judges) for line in notes(results)],
            lead=results.judged[leading] if leading else None,
            cost=results.cost.get("policy", Cost()),
            sections=sections(results, run.name),
            pictures=_pictures(results, gains),
            samples=samples[:_SHOWN],
            hidden=max(0, len(samples) - _SHOWN),
            config=config.model_dump(mode="json"),
            gate=read_json(run.gate),
            health=_health(run, metrics, results),
            verified=read_json(run.directory / "verify.json"),
            provenance=read_json(run.provenance),
            curves=_curves(metrics),
            dropped=len(read_table(run.dropped, DROPPED, ["reason"])) if run.dropped.is_file() else 0,
            rows=_places(run.name, leading),
            address_of=lambda row: addresses.prompt(run.name, row.prompt_id, row.sample),
            view=addresses.PORT,
        )
    )
    durable.write_text(run.report, page)


def _places(run: str, leading: str | None) -> dict[str, str]:
    """Where the rows of figures open that stand in no table."""
    return {
        "lead": addresses.judged(run, leading) if leading else "",
        "policy": addresses.samples(run, model="policy"),
        "compared": addresses.samples(run, model="policy", baseline="reference"),
        "pairs": addresses.pairs(run),
        "dropped": addresses.dropped(run),
        "training": addresses.training(run),
    }


def _pictures(results: Results, gains: Mapping[str, GainByLength]) -> dict[str, Markup]:
    """The pictures of sections by the names that these give them."""
    pictures = {"win_rates": win_rates(list(results.judged.items()))}
    gain = gain_of(results)
    points = points_of(results, gain) if gain else []
    if gain and len(points) >= 2:
        pictures["frontier"] = frontier(points, label_of(results, gain))
    if gain and gain in gains and len({longer for longer, _ in gains[gain].points}) > 1:
        what = "reward against the reference's" if gains[gain].rewards else "score minus one half"
        pictures["length"] = scatter(gains[gain].points, gain, what)
    return pictures


def _curves(metrics: pl.DataFrame) -> list[tuple[str, Markup]]:
    """Titles and pictures of the training; those of what was not logged are left out (a reward model has no logps)."""
    wanted = [
        ("Loss", {"": "loss"}, "loss"),
        ("Reward margin", {"": "rewards/margins"}, "margin"),
        ("Reward accuracy", {"": "rewards/accuracies"}, "accuracy"),
        (
            "Log-probabilities of the responses",
            {"chosen": "logps/chosen", "rejected": "logps/rejected"},
            "nats per response",
        ),
    ]
    return [
        (title, curves(metrics, columns, label, title))
        for title, columns, label in wanted
        if any(metrics[name].count() for column in columns.values() for name in (column, f"eval_{column}"))
    ]


def _health(run: Run, metrics: pl.DataFrame, results: Results) -> list[str]:
    """What looked wrong while training, and in the lengths of what was generated since."""
    words = [str(word) for word in read_json(run.health).get("words", [])]
    tokens = {model: seen.tokens.mean for model, seen in results.responses.items()}
    if {"policy", "reference"} <= tokens.keys():
        words += length_words(metrics.to_dicts(), tokens["policy"], tokens["reference"])
    return words


def environment() -> jinja2.Environment:
    """The templates, escaping whatever they are given and refusing names they are not."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # characters that hide or reorder text are shown, wherever they come from
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    templates.globals |= {
        "marked": marked,
        "in_cell": in_cell,
        "breakable": breakable,
        "widths": WIDTHS,
        "arrows": ARROWS,
    }
    return templates
