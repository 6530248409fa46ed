"""The table of rounds: what samples, rewards, scores and training of each took, and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.artifacts.runs import RUNS, Run, read_json
from pipeline.evaluation.results import Results
from pipeline.report.table import Cell, Section, with_interval
from pipeline.rollouts.rounds import PARTS, name_of


def round_section(results: Results, run: str) -> Section:
    """Rows of the run's rounds.json, with the KL that was measured beside it; without a row if it has none."""
    rounds = read_json(Run(RUNS / run).rounds).get("rounds", [])
    # critics are of some variants alone
    parts = [*PARTS, *(["critic"] if any(one["seconds"].get("critic") for one in rounds) else []), "train"]
    return Section(
        "Rounds",
        [
            "round",
            "run",
            "samples",
            "mean reward of the samples",
            "their log-ratio to the reference",
            "KL after the round",
            *(f"{part}, s" for part in parts),
            "tokens, generated",
            "scored",
            "trained",
        ],
        [_row(one, results, len(rounds), parts) for one in rounds],
        "Samples are written by the policy with which a round begins, so their reward and log-ratio (nats per sample, on training "
        "prompts) are those of the round before. KL after the round: on held-out prompts, nats per response. Seconds and tokens of "
        "training are those of its steps; a critic's are those of its training and its values.",
        source="rounds.json of the run",
    )


def _row(one: dict[str, Any], results: Results, rounds: int, parts: Sequence[str]) -> list[str | Cell]:
    cost = results.cost.get(name_of(one["round"], rounds))
    seconds, tokens = one["seconds"], one["tokens"]
    return [
        str(one["round"]),
        one["run"],
        _number(one["samples"], "d"),
        _number(one["mean_reward"], ".4f"),
        _number(one["kl_before"], ".3f"),
        with_interval(cost.kl, 2) if cost and cost.kl else "-",
        *(f"{seconds[part]:.1f}" for part in parts),
        *(f"{tokens[part]:,}" for part in ("generate", "score", "train")),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
