"""`refscore sweep`: a grid of settings on one set of scores, and the comparison of all.

`--set train.beta=0.03,0.1,0.3` is an axis of the grid; `--set` without commas (or with brackets) holds for every run.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts.grid import grid
from pipeline.artifacts.runs import Run, open_run
from pipeline.config.files import load_config, split_overrides
from pipeline.errors import ConfigError
from stages import console
from stages.steps import step


def main(path: Path, name: str, overrides: list[str]) -> list[Run]:
    """Every point of the grid: precompute (which finds its scores in the store) or rollout (which finds what another point has
    sampled), train, eval; returns their runs.
    """
    points = grid(split_overrides(overrides))
    if len(points) < 2:
        raise ConfigError(
            f"nothing to sweep in {overrides}: give a field several values, --set train.beta=0.03,0.1,0.3"
        )
    # every point must be sound before the first is trained
    configs = [load_config(path, settings) for _, settings in points]
    runs = [open_run(f"{name}-{suffix}") for suffix, _ in points]
    for run, config, (_, settings) in zip(runs, configs, points, strict=True):
        for stage in ("rollout" if config.train.on_samples else "precompute", "train", "eval"):
            step(stage, path, run.name, settings)
    console.say("")
    return runs
