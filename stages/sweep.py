"""`refscore sweep`: a grid of settings on one set of scores, and the comparison of all.

`--set train.beta=0.03,0.1,0.3` is an axis of the grid; `--set` without commas (or with brackets) holds for every run.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from pipeline.artifacts.durable import file_name
from pipeline.artifacts.runs import open_run
from pipeline.config.files import load_config
from pipeline.errors import ConfigError
from stages import compare, console
from stages.steps import step


def run(path: Path, name: str, overrides: list[str]) -> None:
    """Every point of the grid: precompute (which finds its scores in the store), train, eval; then compare."""
    points = grid(overrides)
    if len(points) < 2:
        raise ConfigError(
            f"nothing to sweep in {overrides}: give a field several values, --set train.beta=0.03,0.1,0.3"
        )
    for _, settings in points:
        load_config(path, settings)  # every point must be sound before the first is trained
    runs = [open_run(f"{name}-{suffix}") for suffix, _ in points]
    for one, (_, settings) in zip(runs, points, strict=True):
        for stage in ("precompute", "train", "eval"):
            step(stage, path, one.name, settings)
    console.say("")
    compare.run(runs, None)


def grid(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Every combination of the axes: a suffix for the run's name, and the overrides."""
    fixed = [override for override in overrides if len(_values(override)) == 1]
    axes = [(override.partition("=")[0], _values(override)) for override in overrides if len(_values(override)) > 1]
    found = []
    for values in product(*(values for _, values in axes)):
        chosen = [f"{field}={value}" for (field, _), value in zip(axes, values, strict=True)]
        suffix = "-".join(
            f"{field.rpartition('.')[2]}{file_name(value)}" for (field, _), value in zip(axes, values, strict=True)
        )
        found.append((suffix, [*fixed, *chosen]))
    return found


def _values(override: str) -> list[str]:
    value = override.partition("=")[2]
    if any(sign in value for sign in "[]{}\"'"):
        return [value]
    return [part.strip() for part in value.split(",")]
