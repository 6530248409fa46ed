"""One engine in this process. If it runs out of memory it is started again smaller, once; the log says what to set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import ENGINES, Engine, Request, TopTokens, must_run_here
from pipeline.errors import RefscoreError, first_line
from pipeline.store.identity import Numerics

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def start_single(reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> SmallerOnce:
    """Load the model at `directory` into the configured engine; `longest` is the longest sequence in tokens."""
    must_run_here(numerics)

    def start(reference: ReferenceConfig) -> Engine:
        module, name = ENGINES[reference.engine].scorer
        engine: Engine = getattr(import_module(module), name)(reference, directory, numerics, longest)
        return engine

    return SmallerOnce(reference, start)


class SmallerOnce:
    """`Scorer` around an engine that `start` starts; see `pipeline.engines.protocol.Scorer`."""

    def __init__(self, reference: ReferenceConfig, start: Callable[[ReferenceConfig], Engine]) -> None:
        self._reference, self._start = reference, start
        self._engine = start(reference)
        self._closed = False
        self._may_retry = True

    @property
    def engine(self) -> Engine:
        """The engine that scores now."""
        return self._engine

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`. Raises RefscoreError if memory does not suffice for the smaller engine either."""
        return self._asked(lambda engine: engine.score(sequences))

    def top(self, sequences: Sequence[Request], count: int) -> list[TopTokens]:
        """See `Engine.top`. Raises RefscoreError like `score`."""
        return self._asked(lambda engine: engine.top(sequences, count))

    def _asked(self, ask: Callable[[Engine], list[_Answer]]) -> list[_Answer]:
        try:
            return ask(self._engine)
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            said = first_line(error)
        tokens = smaller(self._engine.batched_tokens)
        if not self._may_retry:
            raise RefscoreError(
                f"the engine ran out of memory ({said}) with {self._engine.batched_tokens} tokens in a forward pass too: "
                f"set reference.max_batched_tokens={tokens} or less, which lowers the cache of keys and values too, or "
                "reference.kv_cache_gib, or data.max_length"
            )
        self._may_retry = False
        log.warning(
            "the engine ran out of memory (%s): started again with %d tokens in a forward pass instead of %d; "
            "set reference.max_batched_tokens=%d to begin so",
            said, tokens, self._engine.batched_tokens, tokens,
        )  # fmt: skip
        self.close()
        self._engine = self._start(self._reference.model_copy(update={"max_batched_tokens": tokens}))
        self._closed = False
        return self._asked(ask)

    def close(self) -> None:
        """See `Scorer.close`."""
        if not self._closed:
            # an engine whose smaller successor did not start is closed already
            self._closed = True
            self._engine.close()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or the operating system refused memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _SAID)


def smaller(tokens: int) -> int:
    """Half, but never less than a forward pass may have."""
    return max(16, tokens // 2)
