"""`refscore rm RUN...`: delete runs, after asking. Scores stay in the store: a run made again scores nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from pipeline.artifacts import durable
from pipeline.artifacts.runs import RUNS, Run, existing_runs, open_run
from pipeline.artifacts.states import remove, runs_here, size_of, votes_in
from pipeline.artifacts.writer import writing
from pipeline.errors import ConfigError
from stages import console
from stages.list import size


def main(names: Sequence[str], *, yes: bool) -> None:
    """Delete the runs. Raises ConfigError if one does not exist, RefscoreError if one is being written: then none is deleted."""
    runs = [must_exist(name) for name in dict.fromkeys(names)]
    for run in runs:
        with writing(run, "refscore rm"):
            console.say(f"{run.directory}: {size(size_of(run.directory))}")
        for path, held in votes_in(run):
            console.say(
                f"  {path}: {size(held)} of votes by {path.stem}, which no command makes again: copy it to keep them"
            )
        for other in _that_name(run, {run.name for run in runs}):
            console.say(f"  run {other!r} names a file of it in its configuration")
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here: say --yes")
        if not typer.confirm(f"Delete {len(runs)} run{'s' if len(runs) > 1 else ''}?", err=True):
            console.say("nothing was deleted")
            return
    for run in runs:
        with writing(run, "refscore rm"):
            # in one step: what is half deleted must not look like a run
            going = durable.temporary_beside(run.directory)
            with durable.explaining_disk(run.directory):
                run.directory.rename(going)
        remove(going)
        console.say(f"deleted {run.name}")


def must_exist(name: str) -> Run:
    """The run of that name. Raises ConfigError if there is none."""
    run = open_run(name)
    if run.name not in {there.name for there in runs_here()}:
        there = ", ".join(run.name for run in runs_here()) or "none"
        raise ConfigError(f"run {name!r} does not exist in {RUNS}; there are: {there}")
    return run


def _that_name(run: Run, going: set[str]) -> list[str]:
    """Other runs whose configuration names this one: a policy that was trained on, a model that was compared with."""
    marks = (f"{run.directory}{os.sep}", f"run:{run.name}")
    found = []
    for name in existing_runs():
        if name in going:
            continue
        words = (RUNS / name / Path(run.config).name).read_text(encoding="utf-8", errors="replace").split()
        if any(word.strip("'\",[]") == marks[1] or marks[0] in word for word in words):
            found.append(name)
    return found
