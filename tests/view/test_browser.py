"""Lists, pairs and curves in a real Chromium: what is compared, what leads where, and what changes while it is looked at."""

from pathlib import Path

from pipeline.artifacts.runs import RUNS, Run
from pipeline.view.pairs import pairs_index
from tests.view.browsing import ordered
from tests.view.runs import write_metrics


def test_the_list_of_runs_leads_to_each_and_compares_the_ticked(pages):
    pages.open("runs")
    assert pages.tab.locator("tbody tr").count() == 4
    row = pages.tab.locator("tbody tr", has=pages.tab.get_by_role("link", name="young", exact=True))
    assert "training, step 4 of 16" in row.inner_text()
    pages.tab.get_by_role("button", name="Show the ticked runs").click()
    assert "Tick two runs or more." in pages.text
    for name in ("one", "other"):
        pages.tab.get_by_label(f"compare {name}").check()
    pages.tab.get_by_role("button", name="Show the ticked runs").click()
    pages.drawn()
    assert pages.place == "runs?run=one&run=other"


def test_runs_side_by_side_have_a_baseline(pages):
    pages.open("runs?run=one&run=other")
    caption = "Difference of scores from {}, prompt by prompt"
    assert caption.format("one") in pages.text
    cell = pages.tab.locator("table", has_text="Difference of scores").locator("tbody tr", has_text="rule:words")
    before = cell.locator("td").nth(1).inner_text()
    assert pages.tab.locator("th", has_text="train.beta").count() == 1
    assert pages.tab.locator("figure polyline").count() >= 2
    pages.choose("baseline", "other")
    assert pages.place == "runs?run=other&run=one"
    assert caption.format("other") in pages.text
    after = cell.locator("td").nth(1).inner_text()
    # the same difference from the other side
    first, second = (float(cell.replace("\N{MINUS SIGN}", "-").split()[0]) for cell in (before, after))
    assert first == -second != 0


def test_runs_of_different_references_are_not_compared_and_say_so(pages):
    pages.open("runs?run=one&run=strange")
    assert "trained against different references: one (abababababab); strange (efefefefefef)" in pages.text
    assert "no difference is tested" in pages.text
    assert "Difference of scores from" not in pages.text


def test_pairs_are_filtered_sorted_and_opened(pages):
    index = pairs_index(Run(RUNS / "one"))
    margins = {}
    for name in ("reference", "policy"):
        chosen, rejected = index[name]
        margins[name] = [None if one is None else one - other for one, other in zip(chosen, rejected, strict=True)]
    pages.open("runs/one/pairs")
    for label, value, passes in (
        ("split", "held out", lambda row: index["held_out"][row]),
        ("topic", "travel", lambda row: row % 3 == 1),
        ("policy", "rejected", lambda row: margins["policy"][row] is not None and margins["policy"][row] < 0),
        (
            "policy",
            "towards",
            lambda row: margins["policy"][row] is not None and margins["policy"][row] > margins["reference"][row],
        ),
    ):
        pages.choose(label, value)
        expected = [row for row in range(60) if passes(row)]
        assert pages.rows == expected[: len(pages.rows)], label
        assert f"{len(expected)} of 60" in pages.text
        pages.choose(label, "")
    for sort, values in (("before", margins["reference"]), ("after", margins["policy"])):
        for up in (False, True):
            pages.go(f"runs/one/pairs?split=training&sort={sort}{'&up=1' * up}")
            expected = [row for row in ordered(values, up=up) if row % 5]
            assert pages.rows == expected[: len(pages.rows)], (sort, up)
            assert len(pages.rows) > 30
    pages.press("j", "Enter")
    assert pages.place.startswith(f"runs/one/pairs/{expected[0]:012x}?split=training")
    assert f"chosen answer {expected[0]}, good" in pages.tab.get_by_label("chosen response", exact=True).inner_text()
    pages.press("j")
    assert pages.title == f"Pair {expected[1]:012x}"
    pages.press("u")
    assert pages.title == "Pairs of one"
    pages.open(f"runs/one/pairs/{7:012x}")
    assert pages.tab.get_by_label("tokens of the chosen response").locator(".token").all_inner_texts() == [
        "<1>",
        "<2>",
        "<7>",
    ]


def test_dropped_rows_by_reason(pages):
    pages.open("runs/one/dropped")
    pages.tab.get_by_role("link", name="duplicate").click()
    pages.drawn()
    assert pages.place == "runs/one/dropped?reason=duplicate"
    table = pages.tab.locator("table").last
    assert table.locator("tbody tr").count() == 10
    assert set(table.locator("tbody td:nth-child(3)").all_inner_texts()) == {"duplicate"}


def test_curves_have_their_values_by_slider_and_pointer_and_findings_their_step(pages):
    pages.open("runs/one/training")
    figure = pages.tab.locator("figure", has_text="Loss").first
    slider = figure.locator("input[type=range]")
    slider.focus()
    for _ in range(4):
        pages.tab.keyboard.press("ArrowLeft")
    assert figure.locator("output").inner_text() == "step 12: training 0.5800, held-out pairs 0.7200"
    width = figure.locator("svg").bounding_box()["width"]
    figure.locator("svg").hover(position={"x": width / 10, "y": 50})
    assert figure.locator("output").inner_text().startswith("step 1: training 0.6900")
    pages.tab.get_by_role("link", name="step 8").click()
    pages.drawn()
    assert pages.place == "runs/one/training?step=8"
    assert figure.locator("output").inner_text().startswith("step 8:")


def test_addresses_that_lead_nowhere_say_so(pages):
    for place, words in {
        "runs/none": "there is nothing at this address",
        "runs/one/nothing": "There is no page at this address.",
        "runs/%E0%A4%A": "There is no page at this address.",
        "runs/one/prompts/none": "This run compares no sample 0 of a prompt none.",
        "runs/one/pairs/none": "No pair none is among the listed.",
        "runs/one/samples?judge=nobody": "No judge nobody compared these models.",
        "runs/one/samples?model=x": "No judge compared x with",
        "runs/young/dropped": "Dropped rows of young",
    }.items():
        pages.open(place)
        assert words in pages.text, place
    # the browser itself reports the one that was asked of the server
    assert [one for one in pages.trouble if "404" in one] == pages.trouble
    pages.trouble.clear()


def test_a_run_that_goes_on_is_followed(pages):
    pages.open("runs/young/training")
    assert "Step 4 of 16." in pages.text
    write_metrics(Run(Path("data/runs/young")), 9)
    pages.until("document.getElementById('main').innerText.includes('Step 9 of 16.')", 15)
    assert "changed: this page shows them now" in pages.tab.inner_text("#said")
