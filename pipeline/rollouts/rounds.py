"""rounds.json: what every round of samples, rewards, scores and training took and reached, from the files of its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, finished_stages, read_json
from pipeline.artifacts.schemas import METRICS
from pipeline.artifacts.tables import read_table
from pipeline.errors import DataError

PARTS = ("generate", "reward", "score")


def write_rounds(runs: Sequence[Run]) -> None:
    """Write it into the last of `runs`, which are the rounds in order; KL is that of the last one's evaluation, if there is one."""
    figures = read_json(runs[-1].eval).get("cost", {})
    rounds = []
    for number, run in enumerate(runs, start=1):
        measured = figures.get(name_of(number, len(runs)), {}).get("kl") or {}
        rounds.append({"round": number, "run": run.name, **_round(run), "kl": measured.get("mean")})
    durable.write_json(runs[-1].rounds, {"rounds": rounds})


def name_of(number: int, rounds: int) -> str:
    """A round's model in the evaluation of the last one."""
    return "policy" if number == rounds else f"round{number}"


def critic_of(run: Run) -> Run:
    """The run that trains the critic of a round, if it has one."""
    return Run(run.directory.with_name(f"{run.name}-critic"))


def _round(run: Run) -> dict[str, Any]:
    """`kl_before`: mean log-ratio to the reference of what was sampled, so of the model with which the round began. What a critic
    took is its training and its values.
    """
    rollout = finished_stages(run).get("rollout", {})
    took = {part: rollout.get(part, {}) for part in PARTS}
    values, of_critic, of_policy = rollout.get("value", {}), _training(critic_of(run)), _training(run)
    seconds = {part: of_part.get("seconds", 0.0) for part, of_part in took.items()}
    tokens = {part: of_part.get("tokens", 0) for part, of_part in took.items()}
    return {
        "seconds": {**seconds, "critic": round(of_critic[0] + values.get("seconds", 0.0), 2), "train": of_policy[0]},
        "tokens": {**tokens, "critic": of_critic[1] + values.get("tokens", 0), "train": of_policy[1]},
        "samples": rollout.get("counts", {}).get("samples"),
        "judge": rollout.get("judge"),
        "mean_reward": rollout.get("mean_reward"),
        "kl_before": rollout.get("kl"),
    }


def _training(run: Run) -> tuple[float, int]:
    """Seconds and tokens of the steps of a training, as its metrics have them; evaluations and checkpoints are not among them."""
    try:
        rows = read_table(run.metrics, METRICS, ["step", "step_seconds", "tokens_per_second"]).to_pylist()
    except DataError:
        return 0.0, 0
    seconds = tokens = 0.0
    last = 0
    for row in sorted(rows, key=lambda row: int(row["step"])):
        if row["step_seconds"] is not None:
            spent = row["step_seconds"] * (row["step"] - last)
            seconds, tokens, last = seconds + spent, tokens + spent * (row["tokens_per_second"] or 0.0), row["step"]
    return round(seconds, 2), round(tokens)
