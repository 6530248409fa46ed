"""Values of samples by a critic, one per token, kept shard by shard beside the samples, under a key of all that decides them.

A critic is a value model that `train.objective=value` made, or any model with a reward model's form. It is read by transformers
through the trainer's own forward pass, the samples of a prompt together, and is alone in memory meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts.runs import RUNS, Run
from pipeline.artifacts.schemas import VALUES
from pipeline.artifacts.tables import arrays_of, list_column, read_table, write_table
from pipeline.config.experiment import Config
from pipeline.config.files import digest
from pipeline.engines.protocol import installed_version
from pipeline.errors import CheckError, ConfigError
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.judges.reward_model import must_reward
from pipeline.models.configuration import position_limit
from pipeline.models.identity import identify_model
from pipeline.models.load import Named, load_tokenizer, vocabulary_digest
from pipeline.models.locate import at_hand, locate
from pipeline.progress import Listener
from pipeline.rollouts.costs import Costs
from pipeline.rollouts.samples import Shard, fetched
from pipeline.rollouts.scores import requests_of

# digits of a key in a file's name; the whole key stands in the file
_DIGITS = 24


@dataclass(frozen=True)
class Critic:
    """A value model and the key of all that decides its values. `name`: as the configuration has it."""

    name: str
    directory: Path
    spec: Named
    dtype: str
    key: str

    def values_of(self, shard: Shard) -> str:
        """Key of the shard's values."""
        return digest({"samples": shard.key, "critic": self.key})

    def values_in(self, run: Run, shard: Shard) -> Path:
        """Where the run keeps the shard's values."""
        return run.rollout_shards / f"values-{self.values_of(shard)[:_DIGITS]}.parquet"

    def values(self, run: Run, shard: Shard) -> dict[tuple[str, int], np.ndarray]:
        """Values of the tokens of each sample that has one, by prompt_id and number. Raises DataError if they are not there."""
        table = read_table(self.values_in(run, shard), VALUES)
        names = zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
        return dict(zip(names, arrays_of(table, "values"), strict=True))

    def must_read(self, longest: int) -> None:
        """Raise ConfigError if a prompt with its response, of up to `longest` tokens, has more than it reads."""
        limit = position_limit(self.directory)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"rollout.critic {self.name!r} reads {limit} tokens, and prompts with their responses have up to {longest}: lower "
                "generate.max_tokens, or choose another critic"
            )


def open_critic(config: Config, dtype: str, vocabulary: str) -> Critic | None:
    """The configured critic, its weights hashed; None if there is none. `dtype`: in which it is read; `vocabulary`: a digest.

    Raises ConfigError if it is not there, gives no scores, or reads other token ids.
    """
    if config.rollout.critic is None:
        return None
    name, spec = config.rollout.critic, _spec(config)
    if name.startswith("run:") and not (Path(spec.model) / "config.json").is_file():
        raise ConfigError(
            f"rollout.critic {name!r}: {spec.model} does not exist: run 'refscore train' with train.objective=value and that run "
            "first (with policy.lora, policy.lora.merge=true)"
        )
    directory = locate(spec)
    must_reward(directory, f"rollout.critic {name!r}")
    if vocabulary_digest(load_tokenizer(directory, spec)) != vocabulary:
        raise ConfigError(
            f"rollout.critic {name!r} has another vocabulary than reference.model {config.reference.model!r}: a token id does not "
            "mean the same to both"
        )
    return Critic(name, directory, spec, dtype, _key(directory, spec, dtype))


def why_other_critic(key: str | None, config: Config, dtype: str) -> str | None:
    """Why values stored under `key` are not the configured critic's, in `dtype`; None if they are, or if it is not at hand."""
    if key is None:
        return "has no values of a critic"
    spec = _spec(config)
    directory = at_hand(spec)
    if directory is not None and _key(directory, spec, dtype) != key:
        return f"has values of another critic than rollout.critic {config.rollout.critic!r} is now"
    return None


def make_values(shards: Sequence[Shard], critic: Critic, run: Run, costs: Costs, listener: Listener) -> None:
    """Write the values that no run has; loads nothing if that is none. Raises CheckError if one is no number."""
    missing = [
        shard
        for shard in shards
        if not fetched(run, critic.values_in(run, shard), critic.values_of(shard), VALUES, shard.responses(run))
    ]
    if not missing:
        listener.say(f"values    of {critic.name}: all made before; no model is loaded")
        return
    started = time.monotonic()
    # torch is not imported to look whether there is anything to do
    from pipeline.rollouts.critics import CriticPass

    total = sum(len(shard.samples(run)) for shard in missing)
    listener.say(f"loading the critic {critic.name} for {total} samples ...")
    with listener.progress("values", total) as ticker, CriticPass(critic.directory, critic.spec, critic.dtype) as read:
        for shard in missing:
            named = list(requests_of(shard, run))
            requests = [request for _, request in named]
            values = read(requests)
            _must_be_finite(critic, values)
            columns = [pa.array([name[side] for name, _ in named], VALUES.field(side).type) for side in (0, 1)]
            table = pa.Table.from_arrays([*columns, list_column(values, VALUES.field("values").type)], schema=VALUES)
            key = critic.values_of(shard)
            write_table(critic.values_in(run, shard), table, {"key": key, "responses": shard.responses(run)})
            tokens = sum(map(len, requests))
            costs.add("value", key, time.monotonic() - started, tokens)
            ticker.advance_tokens(len(requests), tokens)
            started = time.monotonic()
            return_freed_memory()


def _must_be_finite(critic: Critic, values: Sequence[np.ndarray]) -> None:
    if not all(np.isfinite(own).all() for own in values):
        raise CheckError(
            f"rollout.critic {critic.name!r} gives values that are not finite: train it again with a lower train.learning_rate, or "
            "read it in float32 (reference.dtype)"
        )


def place_of(name: str) -> str:
    """The model that `rollout.critic` names: that of a run, or itself."""
    return str(Run(RUNS / name.removeprefix("run:")).model) if name.startswith("run:") else name


def _spec(config: Config) -> Named:
    """The critic, with the trust in code that the policy has, as critics begin as policies."""
    return Named(place_of(str(config.rollout.critic)), trust_remote_code=config.policy.trust_remote_code)


def _key(directory: Path, spec: Named, dtype: str) -> str:
    read_by = f"transformers {installed_version('transformers')} {device_kind()} {dtype}"
    return digest({"model": identify_model(directory, trusts_code=spec.trust_remote_code).digest, "read_by": read_by})
