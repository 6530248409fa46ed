"""The figures of eval.json as tables on the terminal."""

from __future__ import annotations

from typing import Any

from pipeline.report.words import cautions, second_opinions
from stages import console


def show(figures: dict[str, Any]) -> None:
    """Win rates, ratings, responses, what training cost, and the verdict with its cautions last."""
    console.table(
        "Policy against reference", _HEAD, [_rate(name, rate) for name, rate in figures["judges"].items() if rate]
    )
    others = [
        _rate(f"{one['model']} against {one['baseline']}, {one['judge']}", one["rate"])
        for one in figures["others"]
        if one["rate"]
    ]
    if others:
        console.table("Other models", ["models, judge", *_HEAD[1:]], others)
    for judge, rated in figures["ratings"].items():
        rows = [
            [name, f"{one['mean']:+.2f}", f"{one['low']:+.2f} to {one['high']:+.2f}"] for name, one in rated.items()
        ]
        console.table(
            f"Bradley-Terry ratings, {judge}", ["model", "log-odds over the reference", "95 % interval"], rows
        )
    rows = [
        [
            model,
            f"{seen['tokens']['mean']:.1f}",
            f"{seen['words']:.1f}",
            f"{seen['cut_off']:.0%}",
            f"{seen['repetition']:.3f}",
        ]
        for model, seen in figures["responses"].items()
    ]
    console.table("Responses", ["model", "tokens", "words", "cut off", "repetition"], rows)
    rows = [
        [
            model,
            f"{cost['kl']['mean']:.2f}",
            f"{cost['kl']['low']:.2f} - {cost['kl']['high']:.2f}",
            f"{cost['per_token']:.4f}",
        ]
        for model, cost in figures["cost"].items()
        if "kl" in cost
    ]
    if rows:
        console.table("KL to the reference", ["model", "nats a response", "95 % interval", "nats a token"], rows)
    for judge, cost in figures["judge_costs"].items():
        console.say(f"{judge}: " + ", ".join(f"{name.replace('_', ' ')} {value:,g}" for name, value in cost.items()))
    console.say(figures["verdict"])
    for line in [*second_opinions(figures), *cautions(figures)]:
        console.say(f"  {line}")


_HEAD = ["judge", "prompts", "win rate", "95 % interval", "won/tied/lost", "at equal length", "flipped", "failed"]


def _rate(name: str, rate: dict[str, Any]) -> list[str]:
    controlled = rate["length_controlled"]
    return [
        name,
        str(rate["prompts"]),
        f"{rate['rate']['mean']:.3f}",
        f"{rate['rate']['low']:.3f} - {rate['rate']['high']:.3f}",
        f"{rate['wins']} / {rate['ties']} / {rate['losses']}",
        f"{controlled['mean']:.3f}" if controlled else "-",
        str(rate["flips"]),
        str(rate["failed"]),
    ]
