"""Texts of models and data that would act if a page let them, in every view of a real Chromium; and pages for everybody: axe, keys."""

import os

import pytest
from tokenizers import Tokenizer, decoders, models

from pipeline.artifacts.runs import RUNS, Run
from pipeline.evaluation.votes import Votes, ballots
from pipeline.view.comparisons import comparisons
from tests.view.browsing import Pages
from tests.view.runs import HOSTILE, JUDGES, make_run, prompt_id
from tests.view.served import Served

# nothing of this in what a page made of data: these would run, load or restyle
ACTING = "script, img, iframe, style, link, base, meta, object, embed, form[action], [onload], [onerror], [onclick], [srcdoc]"
LINKS = "[...document.querySelectorAll('main a, main form')].map(one => one.getAttribute('href') ?? '').filter(href => !/^(#\\/|report\\/[a-z]+\\/$|$)/.test(href))"
WIDTHS = (1280, 390)
# each scheme and each width is looked at in every run of the tests; all of both take as long again (make test-browser)
LOOKS = [("light", 390), ("dark", 1280)] if os.environ.get("REFSCORE_BROWSER") else []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, browser):
    directory = tmp_path_factory.mktemp("hostile")
    texts = [(text, text, f"x {text} y") for text in HOSTILE]
    judges = (*JUDGES[:2], "rule:<script>window.hacked=1</script><img src=x onerror=window.hacked=1>")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for name, beta in (("hostile", 0.1), ("second", 0.2)):
            run = make_run(
                name, prompts=len(texts), samples=1, texts=texts, judges=judges, topics=tuple(HOSTILE[:8]), beta=beta
            )
            run.config.write_text(
                run.config.read_text().replace("embedded:demo", f"/{name}<img src=x onerror=window.hacked=1>")
            )
            run.gate.write_text('{"<img src=x onerror=window.hacked=1>": "<script>window.hacked=1</script>"}')
            vocabulary = {text[:2000]: number for number, text in enumerate(["", *HOSTILE])}
            tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
            tokenizer.decoder = decoders.Fuse()
            run.model.mkdir()
            tokenizer.save(str(run.model / "tokenizer.json"))
        Votes(run, "anna").add(ballots(run)[0], "first", HOSTILE[0])
    opened = Served(directory)
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def tab(browser, hostile):
    context = browser.new_context()
    context.set_default_timeout(10_000)
    opened = Pages(context, hostile.home)
    opened.tab.goto(hostile.address)
    yield opened
    context.close()


def look(tab):
    assert tab.tab.evaluate("window.hacked === undefined")
    assert tab.tab.evaluate(f"document.querySelector('main').querySelectorAll({ACTING!r}).length") == 0
    assert tab.tab.evaluate(LINKS) == []
    assert tab.tab.evaluate("getComputedStyle(document.querySelector('h1')).display") != "none"
    assert tab.wider_than_the_window() <= 0, tab.place
    assert tab.trouble == []


VIEWS = {
    "runs": None,
    "runs?run=hostile&run=second": "/hostile<img src=x",
    "runs/hostile": "<script>window.hacked=1</script>",
    "runs/hostile/samples": "<script>window.hacked=1</script>",
    "runs/hostile/samples?text=%3Cscript%3E": "<script>window.hacked=1</script>",
    "runs/hostile/pairs": "<script>window.hacked=1</script>",
    "runs/hostile/training": "<script>window.hacked=1</script>",
    "runs/hostile/dropped": "[U+202E]reversed",
    "runs/second/votes": "<script>window.hacked=1</script>",
    "runs/hostile/vote": None,
    "runs/%3Cimg%20src=x%20onerror=window.hacked=1%3E": "there is nothing at this address",
    "runs/hostile/prompts/%3Cimg%20src=x%20onerror=window.hacked=1%3E": "of a prompt <img src=x",
    "runs/hostile/samples?judge=%3Cscript%3Ewindow.hacked=1%3C/script%3E": "No judge <script>",
}


@pytest.mark.parametrize("place", VIEWS)
def test_nothing_acts_in(tab, place):
    for width in WIDTHS:
        tab.tab.set_viewport_size({"width": width, "height": 844})
        tab.open(place)
        tab.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        if place.startswith("runs/%3C"):
            tab.trouble.clear()  # the browser reports what the server has not
        look(tab)
        assert VIEWS[place] is None or VIEWS[place] in tab.tab.evaluate("document.querySelector('main').textContent")


def test_no_prompt_and_no_pair_acts(tab):
    for number, text in enumerate(HOSTILE):
        tab.tab.set_viewport_size({"width": WIDTHS[number % 2], "height": 844})
        for place in (f"runs/hostile/prompts/{prompt_id(number)}", f"runs/hostile/pairs/{number:012x}"):
            tab.go(place)
            tab.tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
            look(tab)
            shown = tab.tab.evaluate("document.querySelector('.prompt').textContent.slice(0, 30000)")
            beginning = text.split("\x00")[0][:20000]
            assert shown.startswith(beginning.replace("\u202e", "[U+202E]").replace("\u202c", "[U+202C]").replace("\u2066", "[U+2066]").replace("\u2069", "[U+2069]").replace("\u0085", "[U+0085]")), number  # fmt: skip
    # a million characters are shown when they are asked for
    tab.go(f"runs/hostile/prompts/{prompt_id(len(HOSTILE) - 1)}")
    tab.tab.get_by_role("button", name="Show the other 980,000 characters").first.click()
    assert tab.tab.evaluate("document.querySelector('.prompt').textContent.length") > 1_000_000
    look(tab)


def test_no_ballot_acts(tab, hostile):
    tab.tab.set_viewport_size({"width": 390, "height": 844})
    tab.open("runs/hostile/vote?voter=zoe&seed=0")
    for number in range(len(HOSTILE)):
        look(tab)
        tab.tab.keyboard.press("s")
        tab.until(f"document.querySelector('main').innerText.includes('{number + 1} of {len(HOSTILE)} answered')")
    assert "That was the last." in tab.text


def test_a_report_with_scripts_in_it_is_inert(browser, hostile):
    context = browser.new_context()
    opened = Pages(context, hostile.home)
    opened.tab.goto(hostile.address)
    opened.tab.goto(f"{hostile.home}report/hostile/")
    assert opened.tab.title() == "report"
    opened.tab.wait_for_timeout(300)
    assert opened.tab.evaluate("window.hacked === undefined")
    # its policy speaks up for everything that it held back; nothing else happened, and nobody was asked
    assert opened.trouble
    assert {one.split(":")[0] for one in opened.trouble} == {"console"}
    assert all("sandboxed" in one or "Content Security Policy" in one for one in opened.trouble), opened.trouble
    context.close()


EVERYWHERE = [
    "runs", "runs?run=one&run=other", "runs/one", "runs/one/samples",
    f"runs/one/prompts/{prompt_id(3)}", "runs/one/pairs", f"runs/one/pairs/{7:012x}", "runs/one/training", "runs/one/dropped",
    "runs/other/votes", "runs/other/vote", "runs/other/vote?voter=zoe", "runs/one/nothing",
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390), *LOOKS])
def test_axe_finds_nothing_serious(pages, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")

    run = Run(RUNS / "other")
    for name, choice in (("anna", "first"), ("bert", "second")):
        for ballot in ballots(run)[:4]:
            Votes(run, name).add(ballot, choice)
    comparisons(run, 0)
    pages.tab.emulate_media(color_scheme=scheme)
    pages.tab.set_viewport_size({"width": width, "height": 844})
    pages.open(EVERYWHERE[0])
    pages.tab.evaluate(axe.AXE_SCRIPT)
    found = []
    for place in EVERYWHERE:
        pages.go(place)
        assert pages.wider_than_the_window() <= 0, place
        results = pages.tab.evaluate("axe.run(document, { resultTypes: ['violations'] })")
        found += [
            (place, one["impact"], one["id"], [node["html"][:150] for node in one["nodes"][:3]])
            for one in results["violations"]
        ]
    assert not [one for one in found if one[1] in ("serious", "critical")]


def focused(pages):
    return pages.tab.evaluate("""() => {
        const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
        return { name: one.closest("label")?.querySelector("span")?.innerText || one.getAttribute("aria-label") || one.innerText,
                 tag: one.tagName, seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && box.width > 0 };
    }""")


def tabbed(pages, presses):
    stops = []
    for _ in range(presses):
        pages.tab.keyboard.press("Tab")
        stops.append(focused(pages))
    return stops


def test_the_keyboard_alone_is_enough(pages):
    pages.open("runs/one/samples")
    # focus stands on the content when a page was opened: before it are the ways to other pages
    for _ in range(9):
        pages.tab.keyboard.press("Shift+Tab")
    stops = tabbed(pages, 7 + 9 + 1 + 40)
    names = [stop["name"] for stop in stops]
    for wanted in (
        "Skip to the content",
        "Runs",
        "Overview",
        "Votes",
        "judge",
        "outcome",
        "topic",
        "cut off",
        "order",
        "direction",
        "text",
        "Search",
        "40 rows",
        "Subject 0?",
    ):
        assert wanted in names, f"{wanted}: {names}"
    assert all(stop["seen"] for stop in stops if stop["tag"] != "BODY"), stops
    # a table that is drawn anew while it scrolls keeps the focus
    assert names[-40:] == [f"Subject {row // 2}?" for row in range(40)]
    pages.press("Enter")
    assert pages.title == f"Prompt {prompt_id(19)}, sample 1"
    pages.open("runs/one/samples")
    pages.press("j")  # a row that is chosen takes no Enter away from what has the focus
    pages.tab.get_by_role("link", name="Training").focus()
    pages.press("Enter")
    assert pages.title == "Training of one"
    pages.open("runs/one/samples")
    pages.tab.locator("label:has(span:text-is('outcome')) select").focus()
    pages.press("ArrowDown")
    assert pages.place == "runs/one/samples?outcome=won"
    pages.open("runs/other/vote?voter=keys")
    names = [stop["name"] for stop in tabbed(pages, 24)]
    for wanted in (
        "The first is better (1)",
        "The second is better (2)",
        "A tie (0)",
        "Skip (s)",
        "a note on this vote",
    ):
        assert wanted in names, f"{wanted}: {names}"
    pages.tab.get_by_role("button", name="A tie").focus()
    pages.tab.keyboard.press("Space")
    pages.until("document.querySelector('main').innerText.includes('1 of 40 answered')")
