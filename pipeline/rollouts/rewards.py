"""Rewards of samples by a judge of texts: its own number for every sample, kept shard by shard beside the samples.

A judge that gives rewards scores every response; one of duels plays every two against each other in both orders, and a
response's score is the mean of its duels. Another judge's rewards have another key, and need no sample anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.digests import file_sha256
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import REWARDS
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.files import digest
from pipeline.config.judges import JudgeConfig
from pipeline.config.rubrics import read_rubric
from pipeline.engines.protocol import engine_version
from pipeline.judges.judging import Duel, Judge, Shown
from pipeline.models.identity import behaviour_digest
from pipeline.models.load import Named
from pipeline.models.locate import locate
from pipeline.progress import Listener
from pipeline.rollouts.costs import Costs
from pipeline.rollouts.samples import Shard, fetched, response_of
from pipeline.version import __version__

# settings of a judge that change no verdict
_WITHOUT_EFFECT = {
    "label", "key_env", "concurrency", "requests_per_minute", "retries", "timeout", "price_in", "price_out", "max_cost",
}  # fmt: skip
_DIGITS = 24


@dataclass(frozen=True)
class Rewarder:
    """A judge, and the key of all that decides its rewards. `asks`: whether a model is loaded for it, or asked elsewhere."""

    judge: Judge
    key: str
    asks: bool

    def rewards_of(self, shard: Shard) -> str:
        """Key of the shard's rewards."""
        return digest({"samples": shard.key, "judge": self.key})

    def rewards_in(self, run: Run, shard: Shard) -> Path:
        """Where the run keeps the shard's rewards."""
        return run.rollout_shards / f"rewards-{self.rewards_of(shard)[:_DIGITS]}.parquet"

    def rewards(self, run: Run, shard: Shard) -> pa.Table:
        """REWARDS' rows, one for each sample that has a token. Raises DataError if they are not there."""
        return read_table(self.rewards_in(run, shard), REWARDS)


def judge_key(settings: JudgeConfig, listed: Sequence[JudgeConfig] = ()) -> str:
    """Digest of what decides a judge's rewards: its settings, and the model or file behind it. `listed`: the configuration's
    judges, whose settings a panel's members take.
    """
    said = {name: getattr(settings, name) for name in JudgeConfig.model_fields if name not in _WITHOUT_EFFECT}
    return digest(said, {"behind": _behind(settings, listed)})


def _behind(settings: JudgeConfig, listed: Sequence[JudgeConfig]) -> Any:
    if settings.kind == "rule":
        return __version__
    if settings.kind == "annotations":
        return file_sha256(Path(settings.argument).expanduser())
    if settings.kind == "panel":
        by_name = {judge.name: judge for judge in listed}
        return [judge_key(by_name.get(name) or JudgeConfig(name=name), listed) for name in settings.members]
    rubric = read_rubric(settings.rubric) if settings.rubric else ""
    if settings.remote:
        return rubric
    return [behaviour_digest(locate(Named(settings.argument))), engine_version("vllm"), rubric]


def asks_a_model(settings: JudgeConfig) -> bool:
    """Whether the judge, or a member of the panel, is a model."""
    if settings.kind == "panel":
        return any(asks_a_model(JudgeConfig(name=member)) for member in settings.members)
    return settings.kind in ("reward_model", "llm")


def make_rewards(shards: Sequence[Shard], rewarder: Rewarder, run: Run, costs: Costs, listener: Listener) -> None:
    """Write the rewards that no run has; samples that the judge failed on are judged again.

    A judge that is a model is asked about all shards at once: it is loaded once, and keeps by itself what it has said.
    """
    missing = [shard for shard in shards if not _is_judged(run, rewarder, shard)]
    if not missing:
        listener.say(f"rewards   {rewarder.judge.name}: all given before")
        return
    for together in [missing] if rewarder.asks else [[shard] for shard in missing]:
        started = time.monotonic()
        written = [_written(shard, run) for shard in together]
        groups = [_shown(shard, rows) for shard, of_shard in zip(together, written, strict=True) for rows in of_shard]
        rewards = iter(score_responses(rewarder.judge, groups))
        seconds = (time.monotonic() - started) / len(together)
        for shard, of_shard in zip(together, written, strict=True):
            given = [
                {"prompt_id": row["prompt_id"], "sample": row["sample"], "reward": reward}
                for rows in of_shard
                for row, reward in zip(rows, next(rewards), strict=True)
            ]
            key = rewarder.rewards_of(shard)
            about = {"key": key, "responses": shard.responses(run)}
            write_table(rewarder.rewards_in(run, shard), pa.Table.from_pylist(given, schema=REWARDS), about)
            costs.add("reward", key, seconds)


def score_responses(judge: Judge, groups: Sequence[Sequence[Shown]]) -> list[list[float | None]]:
    """One score for each response of each group, which are to one prompt; None if the judge failed."""
    if judge.reward is not None:
        flat = iter(judge.reward([response for group in groups for response in group]))
        return [[next(flat) for _ in group] for group in groups]
    meetings = [
        (number, first, second)
        for number, group in enumerate(groups)
        for first, second in permutations(range(len(group)), 2)
    ]
    duels = [Duel(groups[at][a].prompt, groups[at][a].response, groups[at][b].response) for at, a, b in meetings]
    points: list[list[list[float | None]]] = [[[] for _ in group] for group in groups]
    for (number, first, second), verdict in zip(meetings, judge.prefer(duels), strict=True):
        points[number][first].append(verdict)
        points[number][second].append(None if verdict is None else 1.0 - verdict)
    return [[_mean(verdicts) for verdicts in group] for group in points]


def _mean(values: Sequence[float | None]) -> float | None:
    judged = [value for value in values if value is not None]
    return float(np.mean(judged)) if judged and len(judged) == len(values) else None


def _is_judged(run: Run, rewarder: Rewarder, shard: Shard) -> bool:
    path = rewarder.rewards_in(run, shard)
    return (
        fetched(run, path, rewarder.rewards_of(shard), REWARDS, shard.responses(run))
        and not rewarder.rewards(run, shard)["reward"].null_count
    )


def _written(shard: Shard, run: Run) -> list[list[dict[str, Any]]]:
    """The shard's samples by prompt, but those without a token, which say nothing."""
    rows = [row for row in shard.samples(run).to_pylist() if row["response_ids"]]
    return [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]


def _shown(shard: Shard, rows: Sequence[dict[str, Any]]) -> list[Shown]:
    prompts = {prompt.prompt_id: prompt for prompt in shard.prompts}
    return [Shown(prompts[row["prompt_id"]], response_of(row)) for row in rows]
