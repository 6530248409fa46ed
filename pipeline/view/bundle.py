"""The same pages as a folder for any web server: every answer as a file, beside the page that asks for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, RefscoreError
from pipeline.progress import Ticker
from pipeline.view.answers import addresses, answer, as_json, runs_compared
from pipeline.view.server import STATIC

# what marks a folder as one of ours, which may be written anew
MARK = "refscore-view.json"
# runs of which every two are compared in a file of their own
_MOST_BY_TWO = 20
_MODE = b'<body data-source="folder">'


def write_bundle(runs: list[Run], to: Path, ticker: Ticker) -> tuple[int, int, list[str]]:
    """Write the pages of `runs` into `to`; returns how many files and bytes, and what could not be read.

    Raises ConfigError if `to` holds anything that no earlier bundle put there. A folder that was not finished has no mark of
    being whole and is written anew by the next call.
    """
    _must_take(to)
    files, written, problems = 0, 0, []
    for name, content in _pages(runs):
        durable.write_text(to / name, content.decode())
        files, written = files + 1, written + len(content)
    names = [run.name for run in runs]
    for address in addresses(names):
        try:
            content = as_json(_only(answer(address), names) if address == "runs.json" else answer(address))
        except RefscoreError as error:
            content = as_json({"problem": str(error)})
            problems.append(f"{address}: {error}")
        at = to / "data" / address
        with durable.explaining_disk(at):
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(content)
        files, written = files + 1, written + len(content)
        ticker.advance(1, "")
    for place, compared in _compared(names):
        content = as_json(runs_compared(compared))
        durable.write_text(to / "data" / "compare" / place, content.decode())
        files, written = files + 1, written + len(content)
    for run in runs:
        if run.report.is_file():
            content = run.report.read_bytes()
            durable.write_text(to / "report" / run.name / "index.html", content.decode())
            files, written = files + 1, written + len(content)
    durable.write_json(to / MARK, {"runs": names, "files": files, "bytes": written})
    return files, written, problems


def _must_take(to: Path) -> None:
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--bundle {to} is no directory: name another")
    others = sorted(entry.name for entry in to.iterdir()) if to.is_dir() else []
    if not others:
        return
    if MARK not in others:
        raise ConfigError(
            f"--bundle {to} holds {others[0]} and no {MARK} that marks it as pages of refscore, so nothing is written there: "
            "name a new or empty directory"
        )
    for name in ("data", "report", "static"):
        shutil.rmtree(to / name, ignore_errors=True)


def _pages(runs: list[Run]) -> list[tuple[str, bytes]]:
    # begun: a folder that is cut off is ours too
    begun = as_json({"runs": [run.name for run in runs], "files": None})
    index = (STATIC / "index.html").read_bytes()
    if index.count(b"<body>") != 1:
        raise AssertionError("index.html has no plain <body>")
    statics = [
        (f"static/{file.name}", file.read_bytes()) for file in sorted(STATIC.iterdir()) if file.name != "index.html"
    ]
    return [(MARK, begun), ("index.html", index.replace(b"<body>", _MODE)), *statics]


def _compared(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Files of runs side by side, the first as the baseline: every two, and all, of which a page shows those that are asked for."""
    for first in names if len(names) > 1 else []:
        others = [name for name in names if name != first]
        yield f"{first}.json", [first, *others]
        if len(names) <= _MOST_BY_TWO:
            yield from ((f"{first}/{other}.json", [first, other]) for other in others)


def _only(listed: dict[str, list[dict[str, object]]], names: list[str]) -> dict[str, object]:
    return {"runs": [run for run in listed["runs"] if run["name"] in names]}
