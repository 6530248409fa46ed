"""Plots as SVG inside a page: no file beside it, no script, text in the page's own font and colour.

Only numbers and names of our own are drawn; matplotlib escapes them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from markupsafe import Markup

from pipeline.evaluation.frontier import Point
from pipeline.evaluation.rates.statistics import Interval

# a colour that no plot uses, replaced by the page's own text colour
_INK = "#010203"
_BLUE, _ORANGE, _RED, _PURPLE = "#3b7dd8", "#d9822b", "#c2504a", "#9a5fc0"


def curves(metrics: pl.DataFrame, columns: Mapping[str, str], label: str) -> Markup:
    """Metrics over the steps, of every logged step and on held-out pairs. `columns`: what a metric is of -> its name; one
    metric needs no word.
    """
    figure, axes = _axes()
    for (of, column), (line, dots) in zip(columns.items(), ((_BLUE, _ORANGE), (_RED, _PURPLE)), strict=False):
        train = metrics.select("step", column).drop_nulls()
        held_out = metrics.select("step", f"eval_{column}").drop_nulls()
        if len(train):
            words = f"{of}, training step".removeprefix(", ")
            axes.plot(train["step"], train[column], color=line, linewidth=1, alpha=0.8, label=words)
        if len(held_out):
            words = f"{of}, held-out pairs".removeprefix(", ")
            axes.plot(held_out["step"], held_out[f"eval_{column}"], color=dots, marker="o", markersize=4, label=words)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return _svg(figure)


def scatter(points: Sequence[tuple[float, float]], judge: str, gain: str) -> Markup:
    """A dot per prompt: tokens by which the policy is longer than the reference, and its `gain` by the judge."""
    figure, axes = _axes(height=3.2)
    longer, gained = zip(*points, strict=True)
    axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    # many prompts share a point where a judge gives few values: the darker, the more
    axes.plot(longer, gained, "o", color=_BLUE, markersize=5.5, alpha=0.6, markeredgewidth=0)
    axes.set_xlabel("tokens of the policy's response minus the reference's")
    axes.set_ylabel(f"{_short(judge)}\n{gain}")
    return _svg(figure)


def win_rates(rates: Sequence[tuple[str, Interval]]) -> Markup:
    """Named intervals as dots with whiskers around the line where both models win as often."""
    figure, axes = _axes(height=1.0 + 0.45 * len(rates))
    for row, (_, rate) in enumerate(rates):
        axes.plot([rate.low, rate.high], [row, row], color=_BLUE, linewidth=2)
        axes.plot([rate.mean], [row], "o", color=_BLUE)
    axes.axvline(0.5, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rates)), [_short(name) for name, _ in rates])
    axes.set_ylim(len(rates) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("win rate of the policy, ties half, 95 % interval")
    return _svg(figure)


def frontier(points: Sequence[Point], gain: str) -> Markup:
    """What training got against what it cost, a point per model, whiskers both ways; the reference costs nothing."""
    figure, axes = _axes(height=3.4)
    for number, point in enumerate(sorted(points, key=lambda point: point.cost[0])):
        colour = _BLUE if point.highlighted else _ORANGE
        (x, left, right), (y, low, high) = point.cost, point.gain
        axes.plot([left, right], [y, y], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot([x], [y], "o", color=colour, markersize=6)
        # names in turn above and below, as neighbours often have about the same gain
        axes.annotate(
            _short(point.name),
            (x, y),
            xytext=(6, -12 if number % 2 else 6),
            textcoords="offset points",
            fontsize=8,
            color=_INK,
        )
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("KL(policy || reference), nats per response")
    axes.set_ylabel(gain)
    return _svg(figure)


def _short(name: str) -> str:
    text = name if len(name) <= 34 else f"{name[:16]}...{name[-15:]}"
    # matplotlib would read what stands between two dollar signs as mathematics
    return text.replace("$", r"\$")


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
    return Markup(text[text.index("<svg") :].replace(_INK, "currentColor"))  # noqa: S704  # see the module's docstring
