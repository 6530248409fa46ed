"""What a run has come to, from its files alone: which stage, how far, how large, since when. Imports no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.runs import RUNS, Run, finished_stages, read_json
from pipeline.artifacts.tables import read_about
from pipeline.artifacts.writer import Writer, leftovers, writer_of
from pipeline.config.judges import IMPLICIT
from pipeline.errors import RefscoreError, first_line


@dataclass(frozen=True)
class RunState:
    """A run as it lies there. `step` of `steps`: how far its training has come; `changed`: when (ISO 8601); `figures`: what
    stage three found of the policy against the reference.
    """

    name: str
    state: str
    step: int | None
    steps: int | None
    writer: Writer | None
    bytes: int
    changed: str
    figures: dict[str, Any]


def runs_here() -> list[Run]:
    """Every run in this directory, also those of which nothing but a log was written."""
    return [Run(path) for path in sorted(RUNS.glob("[!.]*")) if path.is_dir() and _is_a_run(Run(path))]


def state_of(run: Run) -> RunState:
    """See `RunState`."""
    step, steps = _steps(run)
    files = [path for path in run.directory.rglob("*") if path.is_file() and not path.is_symlink()]
    sizes, times = [0], [0.0]
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue  # it went since
        sizes.append(status.st_size)
        times.append(status.st_mtime)
    changed = datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds")
    return RunState(run.name, _state(run), step, steps, writer_of(run), sum(sizes), changed, _figures(run))


def is_trained(run: Run) -> bool:
    """Whether a training of this run came to its end, and what it made is there: its checkpoints serve nobody any more."""
    made = (run.model / "config.json").is_file() or (run.adapter / "adapter_config.json").is_file()
    return made and "train" in finished_stages(run)


def about_reference(run: Run) -> dict[str, Any]:
    """What the run's table says of the model that its examples were scored under: digests of model, vocabulary and template.

    Of a training on samples that is rollouts.parquet, as the policy stands for the reference in a table without scores.
    """
    about = read_about(run.scored)
    return about if about.get("scored", True) else read_about(run.rollouts) or about


def checkpoints_of(run: Run) -> list[tuple[Path, int]]:
    """The run's checkpoints and their bytes."""
    return [(path, size_of(path)) for path in sorted(run.checkpoints.glob("step_*"))]


def leftovers_of(run: Run) -> list[tuple[Path, int]]:
    """What killed writers left in the run, and its bytes."""
    return [(path, size_of(path)) for path in leftovers(run.directory)]


def votes_in(run: Run) -> list[tuple[Path, int]]:
    """The run's files of people's votes and their bytes: no stage makes them again."""
    return [(path, size_of(path)) for path in sorted(run.votes.glob("*.jsonl"))]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Delete a directory, or a file. Raises RefscoreError if a part of it is still there."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RefscoreError(f"{path} cannot be deleted whole ({first_line(error)}): mend its rights") from None


def _is_a_run(run: Run) -> bool:
    return any(path.exists() for path in (run.config, run.scored, run.log))


def _state(run: Run) -> str:
    finished = {name: str(stage.get("finished", "")) for name, stage in finished_stages(run).items()}
    if is_trained(run):
        return "evaluated" if run.eval.is_file() and finished.get("eval", "") >= finished["train"] else "trained"
    if run.training.is_file():
        return "training"
    if run.rollouts.is_file():
        return "rollouts"
    if run.scored.is_file():
        return "scored" if read_about(run.scored).get("scored", True) else "pairs without scores"
    return "begun"


def _steps(run: Run) -> tuple[int | None, int | None]:
    """The last step that is written down, and how many there will be; None if no training began, or it is not known."""
    steps = read_json(run.training).get("steps")
    try:
        column = pq.read_table(run.metrics, columns=["step"])["step"].to_pylist()
    except (OSError, pa.ArrowException):
        column = []
    return max((step for step in column if step is not None), default=0 if run.training.is_file() else None), steps


def _figures(run: Run) -> dict[str, Any]:
    """Win rate by the first judge of texts, reward accuracy, KL; what a file of another form has is left out."""
    results = read_json(run.eval)
    figures: dict[str, Any] = {}
    try:
        judged = {name: rate["rate"] for name, rate in results.get("judges", {}).items() if rate}
        judge = next((name for name in judged if name != IMPLICIT), None)
        if judge is not None:
            figures["judge"] = judge
            figures["win_rate"] = {part: float(judged[judge][part]) for part in ("mean", "low", "high")}
        if held_out := results.get("held_out"):
            figures["reward_accuracy"] = float(held_out["reward_accuracy"])
        if kl := results.get("cost", {}).get("policy", {}).get("kl"):
            figures["kl"] = {part: float(kl[part]) for part in ("mean", "low", "high")}
    except (KeyError, TypeError, ValueError, AttributeError):
        return figures
    return figures
