"""Plots: lines that stand out from both papers, words for who does not see them, no mark-up from names."""

import re
from itertools import product
from pathlib import Path

import polars as pl
import pytest
from pydantic import TypeAdapter

import pipeline.report
from pipeline.evaluation.frontier import Point
from pipeline.evaluation.rates.winrates import WinRate
from pipeline.report.plots import BLUE, ORANGE, PURPLE, RED, curves, frontier, scatter, win_rates
from tests.report.evaluations import rate

CSS = (Path(pipeline.report.__file__).parent / "templates" / "page.css.j2").read_text()
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w{6})", line)) for line in CSS.splitlines()[:2])
HOSTILE = "a<b>\"'&$x^2$ \u202e"


def luminance(colour):
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_text_stand_out_in_both_schemes(scheme):
    for line in (BLUE, ORANGE, RED, PURPLE):
        assert contrast(line, scheme["paper"]) >= 3
    for paper in ("paper", "card"):
        assert contrast(scheme["edge"], scheme[paper]) >= 3
        for text in ("ink", "soft", "link", "good", "bad"):
            assert contrast(scheme[text], scheme[paper]) >= 4.5
    for marked in ("mark-good", "mark-bad"):
        assert contrast(scheme["ink"], scheme[marked]) >= 4.5


def drawn():
    of = TypeAdapter(WinRate).validate_python(rate())
    metrics = pl.DataFrame({"step": [0, 20], "loss": [0.7, 0.25], "eval_loss": [None, 0.5]})
    points = [Point(HOSTILE, (3.0, 2.0, 4.0), (0.7, 0.6, 0.8)), Point("reference", (0.0,) * 3, (0.5,) * 3, False)]
    return {
        "curves": curves(metrics, {"": "loss"}, "loss", "Loss"),
        "scatter": scatter([(-3.0, 0.25), (4.0, -0.5), (5.0, 1.0)], HOSTILE, "reward"),
        "win_rates": win_rates([(HOSTILE, of), ("j", of)]),
        "frontier": frontier(points, f"reward, {HOSTILE}"),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("curves", "training step: 0.7 at step 0, 0.25 at step 20. held-out pairs: 0.5 at step 20, 0.5 at step 20."),
        ("scatter", "3 prompts. The policy's response is longer on 2, and gains by"),
        ("win_rates", "j: 0.70 (0.60 to 0.80), n = 40."),
        ("frontier", "reference: KL 0 (0 to 0), "),
    ],
)
def test_a_plot_says_in_words_what_it_shows(name, said):
    picture = drawn()[name]
    title, words = (re.search(rf"<{tag} id=\"([^\"]+)\">([^<]*)</{tag}>", picture) for tag in ("title", "desc"))
    assert f'role="img" aria-labelledby="{title[1]} {words[1]}"' in picture
    assert title[2]
    assert said.replace("'", "&#39;") in words[2]


def test_no_name_is_mark_up_in_a_plot_and_ids_are_of_one_plot_alone():
    pictures = drawn()
    ids = [found for picture in pictures.values() for found in re.findall(r'\bid="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in pictures.values():
        assert "<b>" not in picture
        assert "\u202e" not in picture.split("</desc>")[0]
        own = set(re.findall(r'\bid="([^"]+)"', picture))
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', picture)
        assert used
        assert set(used) <= own


def test_lines_are_told_apart_by_more_than_colour():
    columns = {"chosen": "logps/chosen", "rejected": "logps/rejected"}
    rows = {name: [-1.0, -2.0] for of in columns.values() for name in (of, f"eval_{of}")}
    picture = curves(pl.DataFrame({"step": [0, 1], **rows}), columns, "nats")
    styles = re.findall(r'style="fill: none; (stroke-dasharray[^"]+|stroke: #\w{6}[^"]*)"', picture)
    dashed = [style for style in styles if "dasharray" in style]
    assert {colour for style, colour in product(dashed, (RED, PURPLE)) if colour in style} == {RED, PURPLE}
    assert not any(colour in style for style, colour in product(dashed, (BLUE, ORANGE)))
