"""Samples of many prompts, made shard by shard: each is a file that is whole or absent, under a key of all that decides it.

A sample's seed is a digest of prompt and number, so samples do not depend on the shard they are in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.artifacts.runs import RUNS, Run
from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.experiment import GenerateConfig
from pipeline.config.files import digest
from pipeline.engines.protocol import engine_version
from pipeline.engines.reference import OpenedReference
from pipeline.engines.vllm.generator import Sample, generator
from pipeline.errors import DataError
from pipeline.hardware import device_kind
from pipeline.judges.judging import Prompt, Response
from pipeline.progress import Listener
from pipeline.rollouts.costs import Costs

# fields of `generate` that decide a sample
_DECIDING = {"max_tokens", "temperature", "top_p", "samples", "seed", "dtype"}
_IF_SET = ("engine_args", "fixed_length")
# digits of a key in a file's name; the whole key stands in the file
_DIGITS = 24


@dataclass(frozen=True)
class Shard:
    """Prompts whose samples are published together, and the key of these samples."""

    prompts: Sequence[Prompt]
    key: str

    def samples_in(self, run: Run) -> Path:
        """Where the run keeps them."""
        return run.rollout_shards / f"samples-{self.key[:_DIGITS]}.parquet"

    def samples(self, run: Run) -> pa.Table:
        """SAMPLES' rows, those of a prompt one after the other. Raises DataError if they are not there."""
        return read_table(self.samples_in(run), SAMPLES)

    def responses(self, run: Run) -> str:
        """Digest of what the run's samples say: an engine that batches otherwise may sample otherwise under the same key."""
        table = self.samples(run)
        return digest({name: table[name].to_pylist() for name in ("prompt_id", "sample", "response_ids")})


def samples_key(weights: str, prompts: Sequence[Prompt], settings: GenerateConfig) -> str:
    """Digest of all that decides the samples of a model whose weights' digest is `weights`: equal keys, equal samples."""
    engine = engine_version("vllm") or "none"
    ids = ",".join(prompt.prompt_id for prompt in prompts)
    made_by = {"weights": weights, "engine": engine, "device": device_kind()}
    # left out unless set: samples from before they could be keep their key
    others = {name: value for name in _IF_SET if (value := getattr(settings, name))}
    return digest(made_by | others, settings.model_dump(mode="json", include=_DECIDING), ids)


def shards_of(weights: str, prompts: Sequence[Prompt], settings: GenerateConfig, size: int) -> list[Shard]:
    """The prompts in shards of `size`, in order."""
    parts = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    return [Shard(part, samples_key(weights, part, settings)) for part in parts]


def kept_by(shard: Shard) -> Run | None:
    """A run that has the shard's samples; None if they would have to be made."""
    for path in sorted(RUNS.glob(f"*/{shard.samples_in(Run(RUNS)).relative_to(RUNS)}")):
        run = Run(path.parent.parent)
        with suppress(DataError):  # damaged: made again
            if read_about(path).get("key") == shard.key and len(shard.samples(run)):
                return run
    return None


def make_samples(
    shards: Sequence[Shard],
    policy: OpenedReference,
    settings: GenerateConfig,
    run: Run,
    costs: Costs,
    listener: Listener,
) -> None:
    """Write the samples that no run has made; those of other runs are copied. One start of the engine for all shards."""
    missing = [shard for shard in shards if not fetched(run, shard.samples_in(run), shard.key, SAMPLES)]
    total = settings.samples * sum(len(shard.prompts) for shard in shards)
    wanted = settings.samples * sum(len(shard.prompts) for shard in missing)
    if total > wanted:
        rest = "" if missing else "; no engine is started"
        listener.say(f"samples   {total - wanted} made before under the same settings{rest}")
    if not missing:
        return
    longest = max(len(prompt.ids) for shard in missing for prompt in shard.prompts)
    started = time.monotonic()
    with (
        generator(policy.paths.merged, policy.config, longest, settings) as generate,
        listener.progress("the policy generates", wanted) as ticker,
    ):
        for shard in missing:
            responses = generate([prompt.ids for prompt in shard.prompts], settings, ticker.advance_tokens)
            table = sample_table(sample_rows("policy", shard.prompts, responses))
            write_table(shard.samples_in(run), table, {"key": shard.key})
            tokens = sum(len(sample.ids) for of_prompt in responses for sample in of_prompt)
            costs.add("generate", shard.key, time.monotonic() - started, tokens)
            started = time.monotonic()
    listener.say(f"samples   {wanted} made")


def fetched(run: Run, path: Path, key: str, schema: pa.Schema, responses: str | None = None) -> bool:
    """Whether the file at `path`, in the run's shards, is there, whole and of this key; a copy of any run's is put there.

    `responses`: digest of the samples that it must be of.
    """
    for here in (path, *sorted(RUNS.glob(f"*/{run.rollout_shards.name}/{path.name}"))):
        about = read_about(here)
        if about.get("key") != key or responses not in (None, about.get("responses")):
            continue
        try:
            table = read_table(here, schema)
        except DataError:
            continue  # damaged: made again
        if here != path:
            write_table(path, table, read_about(here))
        return True
    return False


def sample_rows(model: str, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]) -> list[dict[str, Any]]:
    """SAMPLES' rows of one model's responses to `prompts`."""
    return [
        {
            "prompt_id": prompt.prompt_id,
            "sample": number,
            "model": model,
            "topic": prompt.topic,
            "prompt": prompt.text,
            "response": sample.text,
            "response_ids": sample.ids,
            "finish_reason": sample.finish_reason,
            "tokens": len(sample.ids),
        }
        for prompt, of_prompt in zip(prompts, samples, strict=True)
        for number, sample in enumerate(of_prompt)
    ]


def sample_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table of samples."""
    return pa.Table.from_pylist(list(rows), schema=SAMPLES)


def response_of(row: dict[str, Any]) -> Response:
    """One row's response, as judges see it."""
    return Response(row["response"].strip(), row["finish_reason"], tuple(row["response_ids"]))
