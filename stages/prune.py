"""`refscore prune [RUN...]`: what finished runs keep and need no more: checkpoints, and what killed writers left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts.runs import RUNS, Run
from pipeline.artifacts.states import checkpoints_of, is_trained, leftovers_of, remove, runs_here, size_of
from pipeline.artifacts.writer import leftovers, writer_of, writing
from stages import console
from stages.list import size
from stages.rm import must_exist


def main(names: Sequence[str], *, apply: bool) -> None:
    """Say what could be freed in the runs (default: in all); with `apply` free it. Runs that are being written are left."""
    runs = [must_exist(name) for name in dict.fromkeys(names)] or runs_here()
    freed = 0
    for run in runs:
        if (writer := writer_of(run)) is not None:
            console.say(f"{run.name}: left as it is, {writer.described()}")
            continue
        if apply:
            # what killed writers left goes when the run is taken
            freed += sum(held for _, held in leftovers_of(run))
            with writing(run, "refscore prune"):
                freed += _free(run)
        else:
            freed += _show(run)
    half_deleted = [(path, size_of(path)) for path in leftovers(RUNS, within=False)]
    for path, held in half_deleted:
        console.say(f"{path}: {size(held)}")
        freed += held
        if apply:
            remove(path)
    if apply:
        console.say(f"freed {size(freed)}")
    else:
        console.say(f"{size(freed)} could be freed; nothing was changed: --apply deletes it")


def _show(run: Run) -> int:
    total = 0
    for path, held in _unneeded(run):
        console.say(f"{path}: {size(held)}")
        total += held
    if not is_trained(run) and (kept := sum(held for _, held in checkpoints_of(run))):
        console.say(f"{run.name}: its training is not finished: {size(kept)} of checkpoints stay")
    return total


def _free(run: Run) -> int:
    unneeded = checkpoints_of(run) if is_trained(run) else []
    for path, held in unneeded:
        remove(path)
        console.say(f"deleted {path}: {size(held)}")
    return sum(held for _, held in unneeded)


def _unneeded(run: Run) -> list[tuple[Path, int]]:
    return leftovers_of(run) + (checkpoints_of(run) if is_trained(run) else [])
