"""Tables of samples and single prompts in a real Chromium: every filter, every order, keys, deep links."""

import pytest

from pipeline.artifacts.runs import RUNS, Run
from pipeline.view.comparisons import comparisons
from tests.view.browsing import ordered
from tests.view.runs import plain_text, prompt_id


def index_of(name="one"):
    return comparisons(Run(RUNS / name), 0).described()


def letters(index, judge=0):
    return index["judges"][judge]["letters"]


def test_an_overview_leads_to_the_rows_behind_its_figures(pages):
    pages.open("runs/one")
    assert "The policy is about as good as the reference." in pages.text
    row = pages.tab.locator("tbody tr", has_text="llm:shades")
    row.get_by_role("link", name="flipped").click()
    pages.drawn()
    expected = [row for row, letter in enumerate(letters(index_of(), 1)) if letter.islower()]
    assert pages.rows == expected
    assert expected


OUTCOMES = {"won": "W", "tied": "T", "lost": "L", "failed": "X", "not judged": "-"}


def test_every_filter_of_samples_leaves_the_rows_that_pass_it(pages):
    index = index_of()
    said = letters(index)
    topics = [index["topics"][index["prompts"]["topic"][prompt]] for prompt in index["prompt"]]
    cut = index["cut"]
    everything = range(40)
    cases = [
        *(("outcome", name, [row for row in everything if said[row].upper() == letter]) for name, letter in OUTCOMES.items()),
        ("outcome", "flipped", [row for row in everything if said[row].islower()]),
        *(("topic", name, [row for row in everything if topics[row] == name]) for name in ("cooking", "travel")),
        ("cut off", "either", [row for row in everything if cut[row]]),
        ("cut off", "model", [row for row in everything if cut[row] & 1]),
        ("cut off", "baseline", [row for row in everything if cut[row] & 2]),
        ("cut off", "none", [row for row in everything if not cut[row]]),
    ]  # fmt: skip
    pages.open("runs/one/samples")
    assert pages.rows == list(everything)
    for label, value, expected in cases:
        pages.choose(label, value)
        assert pages.rows == expected, (label, value)
        assert 0 < len(expected) < 40
        assert f"{len(expected)} of 40 comparisons" in pages.text
        if value in ("flipped", "travel", "either"):
            pages.open(pages.place)  # a deep link leads to the same rows
            assert pages.rows == expected
        pages.choose(label, "")
    pages.go("runs/one/samples?topic=")  # as a report links to prompts without one
    assert pages.rows == [row for row in everything if not topics[row]]
    pages.go("runs/one/samples")
    pages.choose("judge", "rule:other")
    pages.choose("outcome", "won")
    assert pages.rows == [row for row in everything if letters(index, 2)[row].upper() == "W"]
    pages.tab.get_by_role("link", name="Take all filters away").click()
    pages.drawn()
    assert pages.rows == list(everything)


def test_text_is_searched_in_prompts_and_responses(pages):
    pages.open("runs/one/samples")
    for text in ("NEEDLE-7 ", "subject 1?", "no such", "(.*)"):
        pages.tab.get_by_label("text", exact=True).fill(text)
        pages.tab.keyboard.press("Enter")
        pages.drawn()
        texts = [
            [f"Subject {row // 2}?", *(plain_text(row, side, 8) for side in ("policy", "reference"))]
            for row in range(40)
        ]
        expected = [row for row in range(40) if any(text.lower() in one.lower() for one in texts[row])]
        assert pages.rows == expected, text
        if not expected:
            assert "No comparison passes these filters." in pages.text


@pytest.mark.parametrize("sort", ["margin", "length", "kl", "judges"])
def test_every_order_of_samples_in_both_directions(pages, sort):
    index = index_of()
    scores = [judge["scores"] for judge in index["judges"]]
    apart = [[score[row] for score in scores if score[row] is not None] for row in range(40)]
    values = {
        "margin": scores[0],
        "length": [own - other for own, other in zip(index["tokens"], index["baseline_tokens"], strict=True)],
        "kl": [index["prompts"]["kl"][prompt] for prompt in index["prompt"]],
        "judges": [max(said) - min(said) if len(said) > 1 else None for said in apart],
    }[sort]
    pages.open("runs/one/samples")
    pages.choose("order", sort)
    assert pages.rows == ordered(values, up=False)
    pages.choose("direction", "1")
    assert pages.rows == ordered(values, up=True)
    assert pages.rows != list(range(40))


def test_keys_walk_the_table_and_the_prompts_that_passed_its_filters(pages):
    pages.open("runs/one/samples?outcome=won&sort=length")
    rows = pages.rows
    pages.press("j", "j", "k", "j", "Enter")
    assert pages.place == f"runs/one/prompts/{prompt_id(rows[1] // 2)}?outcome=won&sort=length&of={rows[1] % 2}"
    assert f"2 of {len(rows)}" in pages.text
    pages.press("j")
    assert pages.title == f"Prompt {prompt_id(rows[2] // 2)}, sample {rows[2] % 2}"
    pages.press("k", "k", "k")
    assert pages.title == f"Prompt {prompt_id(rows[0] // 2)}, sample {rows[0] % 2}"
    assert "This is the first." in pages.tab.inner_text("#said")
    pages.press("u")
    assert pages.place == "runs/one/samples?outcome=won&sort=length"
    assert pages.rows == rows
    pages.tab.go_back()
    pages.drawn()
    assert pages.title.startswith("Prompt ")


def test_a_prompt_has_responses_verdicts_words_and_tokens(pages):
    pages.open(f"runs/one/prompts/{prompt_id(3)}?sample=1")
    number = 7
    for side, model in enumerate(("policy", "reference")):
        section = pages.tab.get_by_label(f"response of {model}")
        assert plain_text(number, model, 8) in section.inner_text()
        assert (
            f"{5 + number * (3 + side) % 37} tokens, {'cut off' if side and number % 7 == 0 else 'ended (stop)'}"
            in section.inner_text()
        )
        assert model in section.locator("mark").all_inner_texts()[0]
    table = pages.tab.locator("table", has_text="Every verdict in both orders")
    assert table.locator("tbody tr").count() == 6
    details = pages.tab.locator("details", has_text="llm:shades, policy first")
    details.locator("summary").click()
    assert f"I read both, {number}: " in details.inner_text()
    shades = pages.tab.get_by_label("tokens of policy, sample 0").locator(".token")
    assert shades.all_inner_texts() == ["<3>", "<4>", "<5>"]
    assert "log-ratio 0.030" in shades.first.get_attribute("title")
