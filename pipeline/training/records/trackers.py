"""Where a training's metrics are shown while it runs, beside metrics.parquet: TensorBoard, Trackio, Weights & Biases.

A tracker only shows. One that fails after it was opened is left alone with a warning, and the training goes on; one that
cannot be opened is an error before the first step. Resumed, a training goes on in the same curves, and what they show
already is not shown twice; begun again, it has curves of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, first_line

log = logging.getLogger(__name__)

# the project that runs stand under, where a tracker has projects
PROJECT = "refscore"
TRACKIO_PLACE = Path("data/cache/trackio")


class Tracker(Protocol):
    """Shows what it is given."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step, by the names of metrics.parquet."""
        ...

    def flush(self) -> None:
        """Hand over what waits."""
        ...

    def close(self) -> None:
        """The training has ended."""
        ...


def open_trackers(
    names: Sequence[str], run: Run, training: str, config: Mapping[str, Any], resumed_at: int | None
) -> list[Tracker]:
    """The trackers of `train.report_to`. `training`: what tells one training of a run from another, also from one that was
    begun before with the same settings.

    Raises ConfigError if one is not installed, or cannot be opened; the others are closed then.
    """
    opened: list[Tracker] = []
    try:
        for name in names:
            opened.append(_Guarded(name, _opened(name, run, training, config, resumed_at)))  # noqa: PERF401  # some may be open
    except ConfigError:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _opened(name: str, run: Run, training: str, config: Mapping[str, Any], resumed_at: int | None) -> Tracker:
    try:
        if name == "tensorboard":
            return _TensorBoard(run.tensorboard, resumed_at)
        if name == "trackio":
            return _Trackio(run, training, config, resumed_at)
        return _Wandb(run, training, config)
    except ImportError:
        raise ConfigError(
            f"train.report_to names {name}, which is not installed: install it (.venv/bin/uv pip install {name}), or leave it out"
        ) from None
    except Exception as error:  # noqa: BLE001  # every service has errors of its own
        raise ConfigError(
            f"train.report_to: {name} cannot be opened ({first_line(error)}): log in to it, set its mode to offline, or leave "
            "it out"
        ) from None


class _TensorBoard:
    def __init__(self, directory: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(directory), purge_step=None if resumed_at is None else resumed_at + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Trackio:
    def __init__(self, run: Run, training: str, config: Mapping[str, Any], resumed_at: int | None) -> None:
        # read when it is imported; its default lies outside the checkout
        os.environ.setdefault("TRACKIO_DIR", str(TRACKIO_PLACE.resolve()))
        import trackio

        self._trackio = trackio
        name = f"{run.name}-{training}"
        # it would keep a step twice
        self._shown = set() if resumed_at is None else _shown_by_trackio(name)
        trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if fresh := {name: value for name, value in values.items() if (step, name) not in self._shown}:
            self._trackio.log(fresh, step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self._trackio.finish()  # type: ignore[no-untyped-call]


def _shown_by_trackio(name: str) -> set[tuple[int, str]]:
    """What a curve shows already: steps and names of values."""
    from trackio.sqlite_storage import SQLiteStorage

    return {(int(row["step"]), column) for row in SQLiteStorage.get_logs(PROJECT, name) for column in row}


class _Wandb:
    def __init__(self, run: Run, training: str, config: Mapping[str, Any]) -> None:
        import wandb

        run.directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=f"{run.name}-{training}",
            config=dict(config),
            dir=str(run.directory),
            resume="allow",
        )
        # it takes no step that it has, with a warning for each
        self._first = int(self._run.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self._run.finish()


class _Guarded:
    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._works = True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, values))

    def flush(self) -> None:
        self._try(self._tracker.flush)

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, act: Any) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001  # what a service does must not end a training
            self._works = False
            log.warning(
                "%s shows nothing from here on (%s); metrics.parquet has every step", self._name, first_line(error)
            )
