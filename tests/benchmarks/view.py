"""`make bench-view`: how long pages of `refscore view` take on 100,000 samples of each model and 300,000 judgements.

Synthetic responses of some 260 characters, three judges in both orders on half of the comparisons. Times are those of a headless
Chromium on the same machine, from the address, the choice or the key to the rows that it draws; each run has a fresh server and a
fresh browser window, and the median is given. The folder is that of a run of the demo's size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_table
from pipeline.progress import SILENT
from pipeline.view.bundle import write_bundle
from tests.view.browsing import Pages, chromium
from tests.view.runs import make_run
from tests.view.served import Served

_TABLE = "runs/large/samples"
_ROWS = "document.querySelectorAll('tr[data-row]').length > 0"
_END = "document.querySelector('.rows').scrollTop = document.querySelector('.rows').scrollHeight"
# of the comparisons; five in six of them have verdicts: half of all, by three judges in two orders
_JUDGED = 0.6


class Looks:
    """How long each look took, by what was looked at."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, what: str, since: float) -> None:
        self.seconds.setdefault(what, []).append(time.monotonic() - since)

    def time(self, what: str, pages: Pages, act: Callable[[], object], until: str = _ROWS) -> None:
        begun = time.monotonic()
        act()
        pages.drawn()
        pages.until(until, 120)
        self.add(what, begun)

    def around(self, pages: Pages, samples: int) -> None:
        """Filter, order, search, scroll to the end, open a prompt."""
        self.time("a filter (won)", pages, lambda: pages.choose("outcome", "won"))
        pages.choose("outcome", "")
        self.time("an order (tokens)", pages, lambda: pages.choose("order", "length"))
        pages.go(_TABLE)
        self.time("a search for text", pages, lambda: pages.go(f"{_TABLE}?text=needle-4711 "))
        pages.go(_TABLE)
        last = f"document.querySelector('tr[data-row=\"{samples - 1}\"]') !== null"
        self.time("a jump to the last row", pages, lambda: pages.tab.evaluate(_END), last)
        prompt = pages.tab.locator("tr[data-row] a").last
        self.time("the last prompt, opened", pages, prompt.click, "document.querySelector('.sides') !== null")


def visit(browser: Any, directory: Path, samples: int, looks: Looks) -> tuple[int, int]:
    """Look around once with a fresh server; returns its memory afterwards and at most, in KiB."""
    begun = time.monotonic()
    served = Served(directory)
    looks.add("from the command to the address", begun)
    for state in ("first", "second"):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        pages = Pages(context, served.home)
        pages.tab.goto(served.address)
        pages.drawn()
        looks.time(f"the table, {state} window", pages, lambda pages=pages: pages.go(_TABLE))
        if state == "second":
            looks.around(pages, samples)
        assert not pages.trouble
        context.close()
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{served.process.pid}/status").read_text().splitlines())
    served.stop()
    return int(fields["VmRSS"].split()[0]), int(fields["VmHWM"].split()[0])


def folder_of_a_small_run() -> tuple[int, float, float]:
    """Files, megabytes and seconds of the folder of a run of the demo's size: 68 prompts x 4, four judges, 460 pairs."""
    judges = ("rule:a", "rule:b", "rule:c", "llm:shades")
    run = make_run("small", prompts=68, samples=4, judges=judges, outcomes="WTLWLf", words=25, pairs=460, tokens=32)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as to, SILENT.progress("", 1) as ticker:
        files, written, problems = write_bundle([run], Path(to), ticker)
        assert not problems
        return files, written / 1e6, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where, chromium() as browser:
        os.chdir(where)
        run = make_run("large", prompts=options.samples // 4, samples=4, judged=_JUDGED, words=40, evaluated=False)
        counts = (
            len(read_table(run.samples, SAMPLES, ["model"])),
            len(read_table(run.judgements, JUDGEMENTS, ["judge"])),
        )
        print(
            f"{counts[0]:,} samples of two models, {counts[1]:,} judgements; load {os.getloadavg()[0]:.1f} when it began"
        )
        looks = Looks()
        memory = [visit(browser, Path(where), options.samples, looks) for _ in range(options.repeats)]
        print("\n| what | seconds |\n| --- | ---: |")
        for what, found in looks.seconds.items():
            print(f"| {what} | {statistics.median(found):.2f} |")
        now, most = (statistics.median(values) / 2**20 for values in zip(*memory, strict=True))
        print(f"\nthe server's memory: {now:.2f} GiB afterwards, {most:.2f} GiB at most")
        files, size, took = folder_of_a_small_run()
        print(f"the folder of a run of the demo's size: {files} files, {size:.1f} MB, written in {took:.1f} s")
        print(f"load {os.getloadavg()[0]:.1f} when it ended")


if __name__ == "__main__":
    main()
