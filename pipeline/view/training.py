"""A training, as far as it has come: its metrics by step, and what looked wrong since which step."""

from __future__ import annotations

from typing import Any

from pipeline.artifacts.runs import Run, read_json, read_saved_config
from pipeline.artifacts.schemas import METRICS
from pipeline.config.files import load_overrides
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.report.side_by_side import visible
from pipeline.training.checks.health import findings
from pipeline.view.pages import columns
from pipeline.view.texts import short

# evaluations that are looked at for the step since which something was wrong
_MOST_LOOKS = 200


def training(run: Run) -> dict[str, Any]:
    """Columns of metrics.parquet that hold anything, how many steps there will be, the gate's figures, and findings: a
    sentence, and the first evaluated step at which it could have been said.
    """
    table = columns(run.metrics, METRICS, METRICS.names).drop("row")
    steps = read_json(run.training).get("steps")
    return {
        "steps": steps,
        "step": table["step"].to_list(),
        "columns": {name: short(table[name]) for name in table.columns if name != "step" and table[name].count()},
        "gate": read_json(run.gate),
        "findings": _findings(run, table.to_dicts(), steps if isinstance(steps, int) else len(table)),
    }


def _findings(run: Run, metrics: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    train = _train_config(run)
    if train is None or not metrics:
        return []
    now = {found.kind: found.sentence for found in findings(metrics, train, steps)}
    evaluated = [place for place, row in enumerate(metrics) if row["eval_loss"] is not None]
    looks = evaluated[:: max(1, len(evaluated) // _MOST_LOOKS)]
    since: dict[str, int] = {}
    for place in looks if now else []:
        for found in findings(metrics[: place + 1], train, steps):
            since.setdefault(found.kind, metrics[place]["step"])
    last = metrics[-1]["step"]
    return [{"step": since.get(kind, last), "sentence": visible(sentence)} for kind, sentence in now.items()]


def _train_config(run: Run) -> TrainConfig | None:
    saved = read_saved_config(run)
    try:
        return load_overrides(saved, [], str(run.config)).train if saved else None
    except ConfigError:
        return None
