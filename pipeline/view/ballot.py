"""A vote, one ballot at a time: what a person is shown, without who wrote it, and what is written down of the answer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError
from pipeline.evaluation.votes import Ballots, Votes, ballots
from pipeline.report.side_by_side import visible
from pipeline.view.pages import Stamp, stamp

_CHOICES = ("first", "second", "tie", "skip")
# seconds; whole numbers of JSON may be larger than any float
_LONGEST = 1e9


def next_ballot(run: Run, voter: str, model: str, baseline: str, seed: int) -> dict[str, Any]:
    """The first ballot of the seed's order that this voter has not answered, and how far the vote has come.

    Blind: of the two models nothing is in it. `version` must come back with the vote, so that none is counted for responses that
    were replaced meanwhile.
    """
    listed = _ballots(run, seed, model, baseline, stamp(run.samples))
    answered = listed.answered(Votes(run, voter).given())
    number = next((number for number in range(len(listed)) if number not in answered), None)
    progress = {
        "ballots": len(listed),
        "answered": len(answered),
        "identical": listed.identical,
        "version": _version(run),
        "number": number,
    }
    if number is None:
        return progress
    ballot = listed[number]
    texts = {name: visible(getattr(ballot, name)) for name in ("prompt", "first", "second", "topic")}
    return {**progress, **texts}


def cast(run: Run, vote: dict[str, Any]) -> dict[str, Any]:
    """Write down one vote, and give the next ballot. Raises ConfigError for what is no vote on a ballot of this run."""
    voter, model, baseline, note = (_text(vote, name) for name in ("voter", "model", "baseline", "note"))
    seed, number = _number(vote, "seed"), _number(vote, "number")
    if vote.get("version") != _version(run):
        raise ConfigError(
            "the samples were replaced since this page was loaded: load it again, the vote is not counted"
        )
    choice, seconds = vote.get("choice"), vote.get("seconds")
    if choice not in _CHOICES:
        raise ConfigError(f"a vote says one of {', '.join(_CHOICES)}")
    if seconds is not None and not _is_duration(seconds):
        raise ConfigError(f"the seconds that a vote took are a number from 0 to {_LONGEST:.0e}, or nothing")
    listed = _ballots(run, seed, model, baseline, stamp(run.samples))
    if not 0 <= number < len(listed):
        raise ConfigError(f"there is no ballot {number}: there are {len(listed)}")
    Votes(run, voter).add(listed[number], choice, note, seconds)
    return next_ballot(run, voter, model, baseline, seed)


def take_back(run: Run, vote: dict[str, Any]) -> dict[str, Any]:
    """Take the voter's last vote back, and give the ballot that is open then."""
    voter, model, baseline = (_text(vote, name) for name in ("voter", "model", "baseline"))
    Votes(run, voter).undo()
    return next_ballot(run, voter, model, baseline, _number(vote, "seed"))


@lru_cache(maxsize=2)
def _ballots(run: Run, seed: int, model: str, baseline: str, _version: Stamp) -> Ballots:
    return ballots(run, seed, model, baseline)


def _version(run: Run) -> str:
    return "-".join(map(str, stamp(run.samples) or ()))


def _text(vote: dict[str, Any], name: str) -> str:
    value = vote.get(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"{name} of a vote is a text")
    # half a character cannot be written
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_duration(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= _LONGEST


def _number(vote: dict[str, Any], name: str) -> int:
    value = vote.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} of a vote is a whole number")
    return value
