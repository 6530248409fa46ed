"""report.md: the figures of report.html for a pull request. Names are escaped; no model text is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.report.words import cautions, second_opinions

# what `_rate_row` fills
_RATE = ("prompts", "win rate", "95 % interval", "won / tied / lost", "at equal length", "flipped", "failed")


def write_markdown(run: Run, config: Config, figures: dict[str, Any]) -> None:
    """Verdict, cautions and tables of one run."""
    parts = [
        f"### {plain(run.name)}",
        f"**{plain(figures['verdict'])}**",
        "\n".join(f"- {plain(line)}" for line in [*second_opinions(figures), *cautions(figures)]),
        table(["judge", *_RATE], [_rate_row([name], rate) for name, rate in figures["judges"].items() if rate]),
        table(
            ["judge", "model", "against", *_RATE],
            [
                _rate_row([one["judge"], one["model"], one["baseline"]], one["rate"])
                for one in figures["others"]
                if one["rate"]
            ],
        ),
        table(
            ["model", "KL, nats a response", "95 % interval", "tokens, mean", "cut off", "repetition"],
            [_cost_row(model, seen, figures["cost"].get(model, {})) for model, seen in figures["responses"].items()],
        ),
        _settings(config),
    ]
    durable.write_text(run.report_markdown, "\n\n".join(part for part in parts if part) + "\n")


def _settings(config: Config) -> str:
    return (
        f"{plain(config.policy.model)}, {' + '.join(config.train.loss_type)}, beta {config.train.beta:g}; sampled at temperature "
        f"{config.generate.temperature:g}, seed {config.generate.seed}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(plain, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def plain(text: str) -> str:
    """`text` so that Markdown shows it as it is: on one line, nothing in it a mark-up or an HTML tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def _rate_row(names: list[str], rate: dict[str, Any]) -> list[str]:
    controlled = rate["length_controlled"]
    return [
        *names,
        str(rate["prompts"]),
        f"{rate['rate']['mean']:.3f}",
        f"{rate['rate']['low']:.3f} to {rate['rate']['high']:.3f}",
        f"{rate['wins']} / {rate['ties']} / {rate['losses']}",
        f"{controlled['mean']:.3f}" if controlled else "-",
        f"{rate['flips']} of {rate['comparisons']}",
        str(rate["failed"]),
    ]


def _cost_row(model: str, seen: dict[str, Any], cost: dict[str, Any]) -> list[str]:
    kl = cost.get("kl")
    return [
        model,
        f"{kl['mean']:.2f}" if kl else "-",
        f"{kl['low']:.2f} to {kl['high']:.2f}" if kl else "-",
        f"{seen['tokens']['mean']:.1f}",
        f"{seen['cut_off']:.0%}",
        f"{seen['repetition']:.3f}",
    ]
