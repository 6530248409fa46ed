"""The points of a sweep: for every combination of values, the settings and what its run is called.

An axis is an override with several values, `train.beta=0.03,0.1,0.3`; one without commas, or with brackets or quotes, holds
for every point.
"""

from __future__ import annotations

from itertools import product

from pipeline.artifacts.durable import file_name


def grid(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Every combination of the axes: a suffix for the run's name, and the overrides."""
    fixed = [override for override in overrides if len(_values(override)) == 1]
    axes = [(override.partition("=")[0], _values(override)) for override in overrides if len(_values(override)) > 1]
    points = []
    for values in product(*(values for _, values in axes)):
        chosen = [f"{field}={value}" for (field, _), value in zip(axes, values, strict=True)]
        suffix = "-".join(
            f"{field.rpartition('.')[2]}{file_name(value)}" for (field, _), value in zip(axes, values, strict=True)
        )
        points.append((suffix, [*fixed, *chosen]))
    return points


def _values(override: str) -> list[str]:
    value = override.partition("=")[2]
    if any(sign in value for sign in "[]{}\"'"):
        return [value]
    return [part.strip() for part in value.split(",")]
