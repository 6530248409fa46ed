"""`refscore list`: the runs that are here, how far each has come, whether it is being written, its size and key figures."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

from pipeline.artifacts.runs import RUNS
from pipeline.artifacts.states import RunState, runs_here, state_of
from stages import console

_HEAD = ["run", "state", "now", "size", "changed", "win rate (95 %)", "reward accuracy", "KL, nats"]


def main() -> None:
    """Print a row for each run, or all of it as JSON."""
    states = [state_of(run) for run in runs_here()]
    if states:
        console.table("", _HEAD, [_row(state) for state in states])
    else:
        console.say(f"no runs in {RUNS}: 'refscore precompute' begins one")
    if judges := {state.figures["judge"] for state in states if "judge" in state.figures}:
        console.say(f"win rates of the policy against the reference by {', '.join(sorted(judges))}")
    for state in states:
        if state.writer is not None:
            console.say(f"{state.name}: {state.writer.described()}")
    console.answer({"runs": [asdict(state) for state in states]})


def size(count: int) -> str:
    """Bytes as people say them: 2.2 GB, 340 MB, 12 kB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:.{1 if count < 10 ** (power + 1) else 0}f} {unit}"
    return f"{count} B"


def _row(state: RunState) -> list[str]:
    how_far = f"{state.state}, step {state.step} of {state.steps or '?'}"
    figures = state.figures
    return [
        state.name,
        how_far if state.state == "training" and state.step is not None else state.state,
        "running" if state.writer is not None else "",
        size(state.bytes),
        datetime.fromisoformat(state.changed).astimezone().strftime("%Y-%m-%d %H:%M"),
        _interval(figures.get("win_rate"), "{:.0%}"),
        f"{figures['reward_accuracy']:.0%}" if "reward_accuracy" in figures else "",
        _interval(figures.get("kl"), "{:.2f}"),
    ]


def _interval(values: dict[str, float] | None, form: str) -> str:
    if values is None:
        return ""
    mean, low, high = (form.format(values[name]) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
