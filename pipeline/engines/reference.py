"""The configured reference, resolved once: where its bytes lie, how its numbers are computed, and what it is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Scorer, numerics_of
from pipeline.engines.start import start_scorer
from pipeline.errors import CheckError
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import ReferencePaths, locate_reference
from pipeline.progress import SILENT, Listener
from pipeline.store.identity import IMPORTED, Numerics, ReferenceIdentity, identify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenedReference:
    """A reference whose model was found; its weights are hashed and its tokenizer is loaded when first asked for."""

    config: ReferenceConfig
    paths: ReferencePaths
    numerics: Numerics

    @cached_property
    def identity(self) -> ReferenceIdentity:
        """What names its scores. Raises ConfigError for weights or a configuration that cannot be read."""
        return self._identified()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, an adapter's included."""
        return load_tokenizer(self.paths.merged, self.config)

    def start(self, longest: int) -> AbstractContextManager[Scorer]:
        """Start the configured engine with it, for sequences of up to `longest` tokens; stopped on leaving the context."""
        return start_scorer(self.config, self.paths.merged, self.numerics, longest)

    def must_be_unchanged(self) -> None:
        """Raise CheckError if its bytes are no longer those that `identity` names."""
        if self._identified() != self.identity:
            raise CheckError(
                f"the weights in {self.paths.base} changed while they were scored: nothing of this shard is kept"
            )

    def _identified(self) -> ReferenceIdentity:
        paths = self.paths
        return identify(paths.base, self.numerics, paths.adapter, trusts_code=self.config.trust_remote_code)


def open_for_new(config: ReferenceConfig, listener: Listener = SILENT) -> OpenedReference:
    """Like `open_reference`, to score sequences that are made later: as imported scores are of given pairs alone, vLLM takes their
    place, under its own identity, which is said.
    """
    if config.engine == IMPORTED:
        listener.say(
            f"reference scores imported by {config.imported_by!r} are of the pairs alone: new responses are scored here, by vllm"
        )
        config = config.model_copy(update={"engine": "vllm", "imported_by": None})
    return open_reference(config)


def open_reference(config: ReferenceConfig) -> OpenedReference:
    """Find the reference's model, made or fetched if need be; starts no engine.

    Raises ConfigError if the model or the engine is not there.
    """
    return OpenedReference(config, locate_reference(config), numerics_of(config))
