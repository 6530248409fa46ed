"""Both pages in a real browser, wide and narrow, light and dark: nothing runs, nothing is asked of the network, nothing is cut.

Needs Chromium, which `.ci/run` installs on Debian, and playwright. Set REFSCORE_SCREENSHOTS to a directory to keep the pictures,
and REFSCORE_REPORT to look at a page of your own.
"""

import os
from pathlib import Path

import pytest

from pipeline.artifacts.runs import Run
from pipeline.evaluation.compare import differences
from pipeline.report.addresses import PORT
from pipeline.report.comparison import comparison_sections, write_comparison
from tests.report.evaluations import compared, crowded, write

PAGES = ("report", "crowded", "compare")
VIEWS = {(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")} | {(320, "light")}
# all of them: make test-browser
LOOKS = sorted(VIEWS) if os.environ.get("REFSCORE_BROWSER") else [(1280, "light"), (390, "dark"), (320, "light")]

# text that lies outside of the screen, or in a part of the page that is scrolled to see it
CUT = """() => {
  const cut = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (walk.nextNode()) {
    const holder = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || holder.closest("caption, thead, .label, title, desc, style")) continue;
    range.selectNodeContents(walk.currentNode);
    const frame = holder.closest("svg")?.getBoundingClientRect();
    for (const {left, right} of range.getClientRects())
      if (left < (frame?.left ?? 0) - 1 || right > (frame?.right ?? innerWidth) + 1) cut.push(walk.currentNode.textContent);
  }
  for (const one of document.querySelectorAll("body *:not(caption, thead)"))
    if (one.clientWidth && one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX !== "visible")
      cut.push("scrolls: " + one.className);
  return cut;
}"""
# words of the headline, and names in it, that stand on more than one line
BROKEN = """() => {
  const broken = [], range = document.createRange();
  const lines = () => new Set([...range.getClientRects()].map((one) => Math.round(one.bottom))).size;
  for (const name of document.querySelectorAll(".name")) { range.selectNodeContents(name); if (lines() > 1) broken.push(name.textContent); }
  const walk = document.createTreeWalker(document.querySelector(".verdict, .verdicts"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode())
    for (const word of walk.currentNode.textContent.matchAll(/[^\\s-]+/g)) {
      range.setStart(walk.currentNode, word.index);
      range.setEnd(walk.currentNode, word.index + word[0].length);
      if (lines() > 1) broken.push(word[0]);
    }
  return broken;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("browser")
    runs = compared(directory)
    page = directory / "compare.html"
    write_comparison(page, runs, comparison_sections(runs, differences(runs)), ["<b>one</b> mark"])
    found = {
        "report": write(Run(directory / "run")).report,
        "crowded": write(Run(directory / "crowded"), found=crowded()).report,
        "compare": page,
    }
    if chosen := os.environ.get("REFSCORE_REPORT"):
        found["report"] = Path(chosen).absolute()
    return found


@pytest.fixture
def opened(browser, pages):
    """Opens a page as a person with such a screen sees it, its folded parts unfolded; says what was asked of the network."""
    contexts = []

    def open_page(name, width, scheme, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        contexts.append(context)
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name].as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        return page, asked

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_page_is_whole_and_inert(opened, pages, name, width, scheme, tmp_path):
    page, asked = opened(name, width, scheme)
    # nothing but the page itself was asked for, and no model text acted
    assert asked == [pages[name].as_uri()]
    assert "pwned" not in page.title()
    assert page.locator("script, iframe, img, base, object, form, link").count() == 0
    assert not page.evaluate(
        "[...document.querySelectorAll('*')].some(one => [...one.attributes].some(a => a.name.startsWith('on')))"
    )
    addresses = page.locator("a").evaluate_all("every => every.map(one => one.getAttribute('href'))")
    assert addresses
    assert all(address.startswith(f"http://127.0.0.1:{PORT}/#/runs/") for address in addresses)

    # text on paper in this scheme's colours; nothing is cut, scrolled to or broken where it must not be
    ink, paper = (
        sum(map(int, page.evaluate(f"getComputedStyle(document.body).{of}").strip("rgb()").split(",")))
        for of in ("color", "backgroundColor")
    )
    assert (ink > paper) is (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT) == []
    assert page.evaluate(BROKEN) == []

    shot = Path(os.environ.get("REFSCORE_SCREENSHOTS", tmp_path)) / f"{name}_{width}_{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_no_barrier_is_found(opened, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    # the check's own script runs although the page allows none
    page, _ = opened(name, width, scheme, bypass_csp=True)
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []


def test_the_keyboard_reaches_links_and_folded_parts_and_shows_where_it_is(opened):
    page, _ = opened("report", 390, "light")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        kind, outline = page.evaluate(
            "[document.activeElement.tagName, getComputedStyle(document.activeElement).outline]"
        )
        if kind != "BODY":
            assert "solid 3px" in outline
        reached.add(kind)
    assert {"A", "SUMMARY"} <= reached


def test_a_table_that_became_a_list_is_still_a_table_to_who_hears_it(opened):
    page, _ = opened("report", 390, "light")
    table = page.get_by_role("table", name="Policy against reference")
    assert table.get_by_role("columnheader").all_inner_texts()[:2] == ["judge", "prompts"]
    row = table.get_by_role("row").nth(1)
    assert row.get_by_role("rowheader").inner_text() == "rule:no_repetition"
    assert row.get_by_role("cell").nth(1).inner_text().split() == ["win", "rate", "0.700"]
    # heads stand beside the values here, and above them where there is room
    assert row.locator(".label").nth(1).is_visible()
    wide, _ = opened("report", 1280, "light")
    assert not wide.locator(".label").first.is_visible()
    assert wide.get_by_role("columnheader", name="win rate").first.is_visible()
