"""Where the rows behind a figure open: addresses of `refscore view`, which answers while it runs on this machine."""

from __future__ import annotations

from typing import Literal
from urllib.parse import quote

from pipeline.config.judges import IMPLICIT
from pipeline.report.side_by_side import visible

# the port of `refscore view` unless it is told another one
PORT = 7788
PLACE = f"http://127.0.0.1:{PORT}"
_RUNS = f"{PLACE}/#/runs"
Outcome = Literal["won", "tied", "lost", "flipped", "failed"]


def samples(
    run: str,
    *,
    model: str | None = None,
    baseline: str | None = None,
    judge: str | None = None,
    outcome: Outcome | None = None,
    topic: str | None = None,
) -> str:
    """The comparisons of a run's samples, as far as they pass all filters that are given; the empty topic is that of prompts
    without one.
    """
    # the pages show, and so filter, a topic with its hidden characters written out
    shown = None if topic is None else visible(topic)
    return _address(
        f"{_quoted(run)}/samples", model=model, baseline=baseline, judge=judge, outcome=outcome, topic=shown
    )


def responses(run: str, model: str) -> str:
    """The samples of one model; of the reference, which every other model is compared with, as the baseline."""
    return samples(run, baseline=model) if model == "reference" else samples(run, model=model)


def judged(
    run: str,
    judge: str,
    model: str = "policy",
    baseline: str = "reference",
    *,
    outcome: Outcome | None = None,
    topic: str | None = None,
) -> str:
    """The rows that a judge's figure is made of: samples, or of the implicit judge the pairs, which no outcome or topic
    filters; empty if there is no such place.
    """
    if judge != IMPLICIT:
        return samples(run, model=model, baseline=baseline, judge=judge, outcome=outcome, topic=topic)
    return pairs(run) if outcome is None and topic is None else ""


def prompt(run: str, prompt_id: str, sample: int, model: str = "policy", baseline: str = "reference") -> str:
    """One prompt with the responses of two models to it."""
    return _address(f"{_quoted(run)}/prompts/{_quoted(prompt_id)}", sample=str(sample), model=model, baseline=baseline)


def pairs(run: str) -> str:
    """The preference pairs of a run."""
    return _address(f"{_quoted(run)}/pairs")


def training(run: str) -> str:
    """The curves of a run's training."""
    return _address(f"{_quoted(run)}/training")


def dropped(run: str) -> str:
    """The pairs that a run left out, with their reasons."""
    return _address(f"{_quoted(run)}/dropped")


def _address(place: str, **filters: str | None) -> str:
    query = "&".join(f"{name}={_quoted(value)}" for name, value in filters.items() if value is not None)
    return f"{_RUNS}/{place}" + (f"?{query}" if query else "")


def _quoted(text: str) -> str:
    # half a surrogate pair has no UTF-8
    return quote(text, safe="", errors="replace")
