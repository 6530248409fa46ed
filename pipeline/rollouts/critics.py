"""A critic in memory: the values of every token of samples, by transformers, prompts read once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from pipeline.engines.protocol import Request
from pipeline.engines.transformers import TOKENS_PER_BATCH, batches, tree_of
from pipeline.errors import ConfigError, first_line
from pipeline.forward.compiled import compile_layers
from pipeline.forward.values import values_of
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.models.load import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CriticPass:
    """Loads the critic of a directory in `dtype`; leaving the context lets it go. Raises ConfigError if it cannot be built."""

    def __init__(self, directory: Path, spec: ModelSpec, dtype: str) -> None:
        torch.set_float32_matmul_precision("highest")
        model = _loaded(directory, spec, dtype).to(device_kind()).eval()
        # a head of few digits would round every value
        model.score.float()
        self._values = values_of(model, "tree", torch.float32)
        if device_kind() == "cuda":
            compile_layers(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._values
        return_freed_memory()

    @torch.no_grad()
    def __call__(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """For each sequence the values of its response's tokens, float32."""
        found = [np.empty(0, np.float32)] * len(sequences)
        for batch in batches(sequences, TOKENS_PER_BATCH[device_kind()], self._values.tokens):
            trees = [tree_of(sequences, part) for part in batch]
            for places, branches in zip(batch, self._values(trees), strict=True):
                for place, values in zip(places, branches, strict=True):
                    found[place] = values.cpu().numpy()
        return found


def _loaded(directory: Path, spec: ModelSpec, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"critic {spec.model!r}: {directory} cannot be loaded ({first_line(error)})") from None
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(f"critic {spec.model!r}: {type(model).__name__} has no linear score of its hidden states")
    return model
