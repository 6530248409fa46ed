"""report.html: one self-contained page for a person. Model text is hostile input: everything is escaped by the template."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from pipeline import durable
from pipeline.config import Config
from pipeline.runs import Run, read_json
from pipeline.schema import METRICS, read_table

# a colour that no plot uses, replaced by the page's own text colour
_INK = "#010203"
_BLUE, _ORANGE = "#3b7dd8", "#d9822b"


def write_report(run: Run, config: Config, figures: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Render the page from the run's artifacts, `figures` (eval.json) and `samples` (worst first)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = pl.from_arrow(read_table(run.metrics, METRICS))
    assert isinstance(metrics, pl.DataFrame)
    page = environment.get_template("report.html.j2").render(
        run=run.name,
        verdict=verdict(figures),
        figures=figures,
        samples=samples,
        config=config.model_dump(mode="json"),
        gate=read_json(run.gate),
        provenance=read_json(run.provenance),
        plots=[
            ("Loss", _curves(metrics, "loss", "loss")),
            ("Reward margin", _curves(metrics, "rewards/margins", "margin")),
            ("Reward accuracy", _curves(metrics, "rewards/accuracies", "accuracy")),
        ],
        win_rates=_win_rates(figures["judges"]),
    )
    durable.write_text(run.report, page)


def verdict(figures: dict[str, Any]) -> str:
    """The outcome in one sentence, from the first judge of texts; else from the implicit one."""
    judged = {name: rate for name, rate in figures["judges"].items() if rate}
    texts = [name for name in judged if name != "implicit"]
    if not judged:
        return "Nothing could be judged."
    name = texts[0] if texts else "implicit"
    rate = judged[name]["rate"]
    against = "the reference" if texts else "an untrained policy on held-out pairs"
    if rate["low"] > 0.5:
        outcome = f"The policy is better than {against}"
    elif rate["high"] < 0.5:
        outcome = f"The policy is worse than {against}"
    else:
        outcome = f"No difference to {against} could be shown"
    return (
        f"{outcome}: {name} prefers it on {rate['mean']:.0%} of {judged[name]['prompts']} prompts "
        f"(95 % interval {rate['low']:.0%} to {rate['high']:.0%})."
    )


def _curves(metrics: pl.DataFrame, column: str, label: str) -> Markup:
    figure, axes = _axes()
    train = metrics.select("step", column).drop_nulls()
    held_out = metrics.select("step", f"eval_{column}").drop_nulls()
    if len(train):
        axes.plot(train["step"], train[column], color=_BLUE, linewidth=1, alpha=0.8, label="training step")
    if len(held_out):
        values = held_out[f"eval_{column}"]
        axes.plot(held_out["step"], values, color=_ORANGE, linewidth=1.8, marker="o", markersize=4, label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, labelcolor=_INK)
    return _svg(figure)


def _win_rates(judges: dict[str, Any]) -> Markup:
    judged = {name: rate["rate"] for name, rate in judges.items() if rate}
    figure, axes = _axes(height=0.9 + 0.45 * len(judged))
    for row, rate in enumerate(judged.values()):
        axes.plot([rate["low"], rate["high"]], [row, row], color=_BLUE, linewidth=2)
        axes.plot([rate["mean"]], [row], "o", color=_BLUE)
    axes.axvline(0.5, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(judged)), list(judged))
    axes.set_ylim(len(judged) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("win rate of the policy, ties half, 95 % interval")
    return _svg(figure)


def _axes(height: float = 2.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Any) -> Markup:
    import matplotlib as mpl

    buffer = io.StringIO()
    # text stays text; a fixed salt makes the same figure the same bytes
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "refscore", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # matplotlib escapes the text it draws, and only names and numbers of our own are drawn
    return Markup(text[text.index("<svg") :].replace(_INK, "currentColor"))  # noqa: S704
