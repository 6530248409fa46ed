"""What is at an address below data/: the same for the server and for the static folder, which holds the answers as files.

Addresses are made of names of runs and of numbers alone, so that none leads out of the runs' directory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import KL, PAIRS
from pipeline.artifacts.states import runs_here
from pipeline.evaluation.votes import vote_figures
from pipeline.view.comparisons import PAGE, compared_models, comparisons, models_of
from pipeline.view.pages import columns
from pipeline.view.pairs import MOST, dropped, pairs_index, pairs_page
from pipeline.view.runs import overview, runs_list, side_by_side
from pipeline.view.texts import samples_page, search, tokens_page
from pipeline.view.training import training

_OF_RUN = {
    "overview": overview,
    "training": training,
    "pairs": pairs_index,
    "dropped": dropped,
}
_NUMBERED = {
    "samples": lambda run, number: comparisons(run, number).described(),
    "tokens": tokens_page,
    "votes": lambda run, number: vote_figures(run, *models_of(run, number)),
    "pairs": pairs_page,
}
_PATH = re.compile(r"runs/([A-Za-z0-9][A-Za-z0-9._-]*)/([a-z]+)(?:/(\d{1,9}))?(?:/(\d{1,9}))?\.json")


class NoAnswer(Exception):
    """There is nothing at this address."""


def answer(path: str) -> dict[str, Any]:
    """The value at `path`, an address below data/ such as runs/demo/samples/0/3.json.

    Raises NoAnswer for an address of another form or of a run that is not here, RefscoreError if its files cannot be read.
    """
    if path == "runs.json":
        return runs_list()
    found = _PATH.fullmatch(path)
    if not found:
        raise NoAnswer
    name, what, *numbers = found.groups()
    run = run_here(name)
    given = [int(number) for number in numbers if number is not None]
    if not given and what in _OF_RUN:
        return _OF_RUN[what](run)
    if len(given) == 1 and what in _NUMBERED:
        return _NUMBERED[what](run, *given)
    if len(given) == 2 and what == "samples":
        return samples_page(run, *given)
    raise NoAnswer


def run_here(name: str) -> Run:
    """The run of that name. Raises NoAnswer if it is not among those that are here."""
    for run in runs_here():
        if run.name == name:
            return run
    raise NoAnswer


def found_rows(name: str, number: int, text: str) -> dict[str, Any]:
    """The rows of a run's comparisons that have `text` in them."""
    return {"rows": search(run_here(name), number, text)}


def runs_compared(names: list[str]) -> dict[str, Any]:
    """Runs side by side, the first as the baseline."""
    return side_by_side([run_here(name) for name in dict.fromkeys(names)])


def addresses(runs: list[str]) -> Iterator[str]:
    """Every address that pages of these runs ask for, but those of searches."""
    yield "runs.json"
    for name in runs:
        run = run_here(name)
        yield f"runs/{name}/overview.json"
        if run.metrics.is_file():
            yield f"runs/{name}/training.json"
        if run.dropped.is_file():
            yield f"runs/{name}/dropped.json"
        if run.pairs.is_file():
            yield f"runs/{name}/pairs.json"
            count = min(len(columns(run.pairs, PAIRS, ["split"])), MOST)
            yield from (f"runs/{name}/pairs/{page}.json" for page in range(_pages(count)))
        if run.samples.is_file():
            for number in range(len(compared_models(run))):
                yield from (f"runs/{name}/{what}/{number}.json" for what in ("samples", "votes"))
                count = len(comparisons(run, number).table)
                yield from (f"runs/{name}/samples/{number}/{page}.json" for page in range(_pages(count)))
        if run.kl.is_file():
            count = len(columns(run.kl, KL, ["sample"]))
            yield from (f"runs/{name}/tokens/{page}.json" for page in range(_pages(count)))


def as_json(value: Any) -> bytes:
    """`value` as JSON that a browser reads: what is no finite number is null."""
    try:
        return _dumped(value)
    except ValueError:
        return _dumped(_finite(value))


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _pages(count: int) -> int:
    return -(-count // PAGE)
