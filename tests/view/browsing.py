"""Pages of `refscore view` in a real Chromium: opened by their address, waited for, and watched."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABSENT = "no Chromium here (Debian: apt-get install chromium): the pages of refscore view were not seen in a browser"


class Pages:
    """One tab. `trouble`: errors of its console, dialogs, and requests to anywhere but the server."""

    def __init__(self, context: Any, home: str):
        self.home, self.trouble, self.requests = home, [], []
        self.tab = context.new_page()
        self.tab.on("console", lambda said: said.type == "error" and self.trouble.append(f"console: {said.text}"))
        self.tab.on("pageerror", lambda error: self.trouble.append(f"error: {error}"))
        self.tab.on("request", self._asked)
        self.tab.on("dialog", self._dialog)

    def _asked(self, request: Any) -> None:
        self.requests.append(request.url)
        if not request.url.startswith((self.home, "data:")):
            self.trouble.append(f"request: {request.url[:200]}")

    def _dialog(self, dialog: Any) -> None:
        self.trouble.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, place: str) -> None:
        """The page at `place`, such as runs/one/samples?outcome=won, loaded from nothing."""
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.home}#/{place}")
        self.drawn()

    def go(self, place: str) -> None:
        """The page at `place`, from the one that is there."""
        self.tab.evaluate("hash => { location.hash = hash }", f"#/{place}")
        self.drawn()

    def drawn(self) -> None:
        """Wait until the page of the address that stands there is drawn."""
        self.until("document.getElementById('main')?.dataset.hash === location.hash")

    def until(self, expression: str, seconds: float = 20) -> None:
        # in a loop of our own: the pages' policy forbids the evaluation that Playwright waits with
        end = time.monotonic() + seconds
        while not self.tab.evaluate(expression):
            assert time.monotonic() < end, f"{expression} never came true at {self.place}: {self.text[:300]}"
            time.sleep(0.01)

    def choose(self, label: str, value: str) -> None:
        self.tab.locator(f"label:has(span:text-is('{label}')) select").select_option(value)
        self.drawn()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)
            self.drawn()

    @property
    def place(self) -> str:
        return self.tab.evaluate("location.hash").removeprefix("#/")

    @property
    def text(self) -> str:
        return self.tab.inner_text("main")

    @property
    def title(self) -> str:
        return self.tab.inner_text("h1")

    @property
    def rows(self) -> list[int]:
        """The numbers of the rows that a long table shows, in their order."""
        return self.tab.evaluate("[...document.querySelectorAll('tr[data-row]')].map(row => Number(row.dataset.row))")

    def wider_than_the_window(self) -> int:
        return self.tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def ordered(values: list[float | None], *, up: bool) -> list[int]:
    """The numbers of rows by their values, equal ones in the order of the file, what is not known last."""
    known = [row for row, value in enumerate(values) if value is not None]
    known.sort(key=lambda row: (values[row] if up else -values[row], row))
    return known + [row for row, value in enumerate(values) if value is None]


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; the test is skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup for tests")
    if CHROMIUM is None:
        pytest.skip(ABSENT)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
