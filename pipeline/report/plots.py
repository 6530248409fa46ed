"""Plots as SVG inside a page: no file beside it, no script, text in the page's own font and colour.

Only numbers and names are drawn; matplotlib and markupsafe escape them. Every plot says in words what it shows. Colours
stand out from light and from dark paper; if there are several, shape or dashes tell apart what colour does.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from markupsafe import Markup, escape

from pipeline.evaluation.frontier import Point
from pipeline.evaluation.rates.winrates import WinRate
from pipeline.report.side_by_side import visible
from pipeline.report.table import between
from pipeline.report.wrapping import LONGEST, shortened

# a colour that no plot uses, replaced by the page's own text colour
_INK = "#010203"
# at least 3 to 1 against the paper of both colour schemes, see page.css.j2
BLUE, ORANGE, RED, PURPLE = "#3b7dd8", "#bd6a14", "#c2504a", "#9a5fc0"
# inches: on a telephone the text keeps its size of about 11 pixels
_WIDTH = 4.2
_SMALL = 9


def curves(metrics: pl.DataFrame, columns: Mapping[str, str], label: str, title: str = "") -> Markup:
    """Metrics over the steps, of every logged step and on held-out pairs. `columns`: what a metric is of -> its name; one
    metric needs no word.
    """
    figure, axes = _axes(height=2.8)
    said: list[str] = []
    for (of, column), (line, dots, dashes) in zip(
        columns.items(), ((BLUE, ORANGE, "-"), (RED, PURPLE, "--")), strict=False
    ):
        train = metrics.select("step", column).drop_nulls()
        held_out = metrics.select("step", f"eval_{column}").drop_nulls()
        drawn = {"linestyle": dashes, "linewidth": 1.4}
        for found, what, style in (
            (train, "training step", {"color": line, **drawn}),
            (held_out, "held-out pairs", {"color": dots, "marker": "s" if said else "o", "markersize": 4.5, **drawn}),
        ):
            if len(found):
                words = f"{of}, {what}".removeprefix(", ")
                steps, values = (found.to_series(number).to_list() for number in range(2))
                axes.plot(steps, values, label=words, **style)
                said.append(f"{words}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}.")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    figure.legend(frameon=False, fontsize=_SMALL, labelcolor=_INK, loc="outside upper left", ncols=2, columnspacing=1)
    return _svg(figure, title or label, " ".join(said))


def scatter(points: Sequence[tuple[float, float]], judge: str, gain: str) -> Markup:
    """A dot per prompt: tokens by which the policy is longer than the reference, and its `gain` by the judge."""
    figure, axes = _axes(height=3.2)
    longer, gained = zip(*points, strict=True)
    axes.axhline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    # many prompts share a point if a judge gives few values: rings show how many more than dots would
    axes.plot(longer, gained, "o", color=BLUE, markersize=5.5, markerfacecolor="none", markeredgewidth=1.1)
    axes.set_xlabel("tokens of the policy's response\nminus the reference's")
    axes.set_ylabel(f"{_plain(judge)}\n{gain}")
    above, beyond = (sum(value > 0 for value in values) for values in (gained, longer))
    said = f"{len(points)} prompts. The policy's response is longer on {beyond}, and gains by {judge} on {above}."
    return _svg(figure, f"{judge}: {gain}, against length", said)


def win_rates(rates: Sequence[tuple[str, WinRate]]) -> Markup:
    """Named rates as dots with their intervals around the line where both models win as often."""
    figure, axes = _axes(height=0.8 + 0.5 * len(rates))
    for row, (name, judged) in enumerate(rates):
        rate = judged.rate
        # the line of even chances, but not through the names
        axes.plot([0.5, 0.5], [row - 0.2, row + 0.4], color=_INK, linewidth=0.8, linestyle=":")
        axes.plot([rate.low, rate.high], [row, row], color=BLUE, linewidth=2)
        axes.plot([rate.mean], [row], "o", color=BLUE)
        words = f"{_plain(name)}, n = {judged.prompts}"
        axes.text(0.01, row - 0.25, words, fontsize=_SMALL, color=_INK, va="bottom", in_layout=False)
    axes.set_yticks([])
    axes.set_ylim(len(rates) - 0.6, -0.9)
    axes.set_xlim(0, 1)
    axes.set_xlabel("win rate of the policy, ties half, 95 % interval")
    said = (f"{name}: {one.rate.mean:.2f} ({between(one.rate, 2)}), n = {one.prompts}." for name, one in rates)
    return _svg(figure, "Win rates of the policy", " ".join(said))


def frontier(points: Sequence[Point], gain: str) -> Markup:
    """What training got against what it cost, a point per model, whiskers both ways; the reference costs nothing."""
    figure, axes = _axes(height=3.2)
    ordered = sorted(points, key=lambda point: point.cost[0])
    middle = (ordered[0].cost[0] + ordered[-1].cost[0]) / 2
    for number, point in enumerate(ordered):
        colour, shape = (BLUE, "o") if point.highlighted else (ORANGE, "s")
        (x, left, right), (y, low, high) = point.cost, point.gain
        axes.plot([left, right], [y, y], color=colour, linewidth=1.4)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.4)
        axes.plot([x], [y], shape, color=colour, markersize=6)
        # names in turn above and below, as neighbours often have about the same gain, and towards the middle
        axes.annotate(
            _plain(point.name, 22),
            (x, y),
            xytext=(6 if x <= middle else -6, -13 if number % 2 else 6),
            textcoords="offset points",
            ha="left" if x <= middle else "right",
            fontsize=_SMALL,
            color=_INK,
        )
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("KL(policy || reference), nats per response")
    axes.set_ylabel("\n".join(_plain(part) for part in gain.split(", ", 1)))
    said = (
        f"{point.name}: KL {point.cost[0]:.3g} ({point.cost[1]:.3g} to {point.cost[2]:.3g}), {gain} {point.gain[0]:.3g} "
        f"({point.gain[1]:.3g} to {point.gain[2]:.3g})."
        for point in ordered
    )
    return _svg(figure, f"{gain}, against KL to the reference", " ".join(said))


def _plain(name: str, longest: int = LONGEST) -> str:
    # matplotlib would read what stands between two dollar signs as mathematics
    return shortened(name, longest).replace("$", r"\$")


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
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


def _svg(figure: Any, title: str, said: str) -> Markup:
    """The figure as an image with a name and a description; its ids are its own among those of other figures."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # text stays text; a fixed salt makes the same figure the same bytes
    style = {"svg.fonttype": "none", "svg.hashsalt": "refscore", "font.family": "sans-serif"}
    with mpl.rc_context(style), warnings.catch_warnings():
        # a name in a script that the font here lacks: the reader's own font has it, only its width is guessed
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    own = re.sub(r"\W+", "-", title.lower())
    drawn = re.sub(
        r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", text[text.index("<svg") :].replace(_INK, "currentColor")
    )
    named = (
        f'<svg role="img" aria-labelledby="{own}-title {own}-said"><title id="{own}-title">{escape(visible(title))}</title>'
        f'<desc id="{own}-said">{escape(visible(said))}</desc>'
    )
    opening, rest = drawn.split(">", 1)
    return Markup(named.replace("<svg", opening, 1) + rest)  # noqa: S704  # see the module's docstring
