"""Where lines end: names at their seams or nowhere, figures whole; what a table needs before it becomes a list."""

import pytest
from markupsafe import Markup

from pipeline.report.table import Cell, Section
from pipeline.report.wrapping import breakable, in_cell, on_one_line, shortened, stacked_below, with_names


def pieces(markup):
    """Texts between the places at which a line may end."""
    return [Markup(part).striptags() for part in markup.replace("<wbr>", "\n").replace("</span> ", "\n").split("\n")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.51 (0.46 to 0.55), n = 34", ["0.51", "(0.46 to 0.55),", "n = 34"]),
        ("0.824 [0.735, 0.912], n = 68", ["0.824", "[0.735, 0.912],", "n = 68"]),
        ("0 of 272", ["0 of 272"]),
        ("-0.109 to +0.080", ["-0.109 to +0.080"]),
        ("6.2e-08", ["6.2e-08"]),
        ("-", ["-"]),
        ("rule:sentiment=vader", ["rule:", "sentiment=", "vader"]),
        ("a" * 60, ["a" * 18, "a" * 18, "a" * 18, "a" * 6]),
    ],
)
def test_figures_break_at_their_interval_and_names_at_their_seams(text, parts):
    assert pieces(in_cell(text)) == parts


def test_nothing_that_is_wrapped_can_act():
    for make in (
        in_cell,
        breakable,
        on_one_line,
        lambda text: with_names(text, {"implicit": "x", text: "y"}, whole=True),
    ):
        for text in ("<b>\u202e", "1 (<b>\u202e", "a" * 60 + "<b>\u202e"):
            assert "<b>" not in make(text)
            assert "\u202e" not in make(text)
            assert "[U+202E]" in make(text)


def test_a_headline_breaks_in_no_name_and_its_names_lead_to_their_rows():
    said = with_names("It is better: rule:a=b, which is new, on 82% (95 % interval).", {"rule:a=b": "#x"}, whole=True)
    assert '<a href="#x"><span class="name" style="--characters:9">rule:a=b</span></a>, which' in said
    assert "<wbr>" not in said
    assert "95\N{NO-BREAK SPACE}%" in said
    # of two names the longer one, and no part of a word
    both = with_names("rule:ab and rule:a, rule:abc", {"rule:a": "#1", "rule:ab": "#2"})
    assert [part.split('"')[0] for part in both.split('href="')[1:]] == ["#2", "#1"]
    assert with_names("<i>", {}) == "&lt;i&gt;"


def test_long_names_are_shortened_and_wide_signs_counted():
    name = f"rule:{'x' * 60}/end"
    assert len(shortened(name)) == 34
    # m is wide: fewer of them have room
    assert shortened("m" * 60) == "m" * 10 + "..." + "m" * 9
    assert shortened(name).startswith("rule:x")
    assert shortened(name).endswith("x/end")
    assert shortened("a" * 34) == "a" * 34
    assert f'title="{name}"' in on_one_line(name)
    assert "--characters:5" in on_one_line("\u5224\u5b9a")


def test_a_table_stays_one_where_it_has_room():
    row = ["policy", "0.51 (0.46 to 0.55), n = 34"]
    assert stacked_below(["model", "rate"], [row]) == "stacked-22"
    assert stacked_below(["model", *["rate"] * 4], [[row[0], *[row[1]] * 4]]) == "stacked-44"
    # never side by side, however wide the screen
    assert stacked_below(["model", *["rate"] * 12], [[row[0], *[row[1]] * 12]]) == "stacked"
    assert stacked_below(["", ""], [["", ""]]) == "stacked-22"


def test_a_cell_has_an_address_or_one_for_each_of_its_figures():
    assert list(Cell("a / b", rows="#x").figures()) == [("a / b", "#x")]
    assert list(Cell("1 / 0 / 2", rows=["#w", "", "#l"]).figures()) == [("1", "#w"), ("0", ""), ("2", "#l")]
    assert list(Cell("a").figures()) == [("a", "")]
    assert Section("t", ["a", "b"], [["x", Cell("y")]]).cells == [[Cell("x"), Cell("y")]]
