"""rollouts.parquet: samples, rewards and scores brought together shard by shard, and what was left out, counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import parquet_writer
from pipeline.rollouts.rewards import Rewarder
from pipeline.rollouts.samples import Shard
from pipeline.rollouts.scores import Scores
from pipeline.rollouts.values import Critic


@dataclass
class Counts:
    """Prompts and samples of rollouts.parquet, and what became of the others.

    `generated` = `samples` (rows) + `empty` (no token) + `not_finite` (a score is no number). Of the rows: `cut_off`;
    `judge_failed` (no reward), of which `rewards_not_finite` had one that is no number. Of `prompts`: `too_long` (no room for a
    response), `without_samples` (no row, those too long included), `equal_rewards` (two rewards or more, and all the same).
    """

    prompts: int = 0
    too_long: int = 0
    without_samples: int = 0
    generated: int = 0
    samples: int = 0
    empty: int = 0
    not_finite: int = 0
    cut_off: int = 0
    judge_failed: int = 0
    rewards_not_finite: int = 0
    equal_rewards: int = 0

    def described(self) -> dict[str, int]:
        """All of them by name."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What was left out or teaches nothing, for people."""
        said = {
            "prompts that leave no room for generate.max_tokens": self.too_long,
            "samples without a token": self.empty,
            "samples whose scores are not finite": self.not_finite,
            "prompts without any sample": self.without_samples - self.too_long,
        }
        lines = [f"left out  {count} {what}" for what, count in said.items() if count]
        if self.equal_rewards:
            lines.append(f"equal     {self.equal_rewards} prompts whose samples all have the same reward")
        return lines


@dataclass
class Rows:
    """The rows of rollouts.parquet, to be counted first and written then."""

    run: Run
    shards: Sequence[Shard]
    rewarder: Rewarder
    policy: Scores
    reference: Scores
    critic: Critic | None = None
    counts: Counts = field(default_factory=Counts)
    rewards: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def count(self) -> None:
        """Fill `counts` but for prompts that were never sampled, and `rewards`."""
        counts = self.counts
        for shard in self.shards:
            rows = self._kept(shard)
            counts.prompts += len(shard.prompts)
            counts.samples += len(rows)
            counts.cut_off += sum(row["finish_reason"] == "length" for row in rows)
            counts.judge_failed += sum(row["reward"] is None for row in rows)
            self.rewards += [row["reward"] for row in rows if row["reward"] is not None]
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]
            counts.without_samples += len(shard.prompts) - len(groups)
            for group in groups:
                rewards = [row["reward"] for row in group if row["reward"] is not None]
                counts.equal_rewards += len(rewards) > 1 and len(set(rewards)) == 1

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write the file durably, and fill `kl`: the log-ratio of every sample. Raises CheckError if a score is gone."""
        self.kl.clear()
        with durable.replacing(path) as temporary, parquet_writer(temporary, ROLLOUTS, about) as writer:
            for table in self._tables():
                writer.write_table(table)

    def _tables(self) -> Iterator[pa.Table]:
        both = zip(self.shards, self.policy.by_shard(), self.reference.by_shard(), strict=True)
        for shard, logps, ref_logps in both:
            keys, ref_keys = self.policy.keys(shard), self.reference.keys(shard)
            rows = self._kept(shard, counting=False)
            values = self.critic.values(self.run, shard) if self.critic else {}
            for row in rows:
                name = row["prompt_id"], row["sample"]
                row["logps"], row["ref_logps"] = logps[keys[name]], ref_logps[ref_keys[name]]
                row["logp"], row["ref_logp"] = (_sum(row[of]) for of in ("logps", "ref_logps"))
                row["values"] = values.get(name)
                self.kl.append(row["logp"] - row["ref_logp"])
            yield pa.Table.from_pylist(rows, schema=ROLLOUTS)

    def _kept(self, shard: Shard, *, counting: bool = True) -> list[dict[str, Any]]:
        """The shard's rows without scores: those with a token, and with scores that are finite."""
        rewards = {
            (row["prompt_id"], row["sample"]): row["reward"]
            for row in self.rewarder.rewards(self.run, shard).to_pylist()
        }
        keys, ref_keys = self.policy.keys(shard), self.reference.keys(shard)
        prompts = {prompt.prompt_id: prompt.ids for prompt in shard.prompts}
        kept, dropped = [], Counts()
        for row in shard.samples(self.run).to_pylist():
            name = row["prompt_id"], row["sample"]
            dropped.generated += 1
            if name not in keys:
                dropped.empty += 1
            elif keys[name] in self.policy.quarantined or ref_keys[name] in self.reference.quarantined:
                dropped.not_finite += 1
            else:
                reward = rewards[name]
                if reward is not None and not math.isfinite(reward):
                    dropped.rewards_not_finite += 1
                    reward = None
                kept.append({**row, "prompt_ids": prompts[row["prompt_id"]], "reward": reward})
        if counting:
            for what in ("generated", "empty", "not_finite", "rewards_not_finite"):
                setattr(self.counts, what, getattr(self.counts, what) + getattr(dropped, what))
        return kept


def _sum(logps: np.ndarray) -> float:
    return float(logps.sum(dtype=np.float64))
