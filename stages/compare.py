"""`refscore compare RUN...`: experiments side by side."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError
from pipeline.runs import Run, existing_runs, read_json, read_saved_config
from stages import console


def run(runs: list[Run]) -> None:
    """Print the settings in which `runs` differ and the figures they reached."""
    for one in runs:
        if not one.config.is_file():
            raise ConfigError(f"run {one.name!r} does not exist; there are: {', '.join(existing_runs()) or 'none'}")
    settings = {one.name: _flat(read_saved_config(one)) for one in runs}
    names = sorted({name for values in settings.values() for name in values})
    differing = [name for name in names if len({str(values.get(name)) for values in settings.values()}) > 1]
    rows = [[name, *(str(settings[one.name].get(name, "-")) for one in runs)] for name in differing]
    figures = {one.name: _figures(read_json(one.eval)) for one in runs}
    reached = dict.fromkeys(name for values in figures.values() for name in values)
    rows += [[name, *(figures[one.name].get(name, "-") for one in runs)] for name in reached]
    if not rows:
        console.say("the runs have the same settings and no figures yet: run 'refscore eval' for each")
        return
    console.table("", ["", *(one.name for one in runs)], rows)


def _figures(evaluated: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, rate in evaluated.get("judges", {}).items():
        if rate:
            found[f"win rate, {name}"] = (
                f"{rate['rate']['mean']:.3f} [{rate['rate']['low']:.3f}, {rate['rate']['high']:.3f}]"
            )
    held_out = evaluated.get("held_out") or {}
    if held_out:
        found["held-out reward accuracy"] = f"{held_out['reward_accuracy']:.3f}"
        found["held-out mean margin"] = f"{held_out['mean_margin']:.3f}"
    policy = evaluated.get("responses", {}).get("policy")
    if policy:
        found["response tokens, mean"] = f"{policy['tokens']['mean']:.1f}"
        found["responses cut off"] = f"{policy['cut_off']:.0%}"
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
