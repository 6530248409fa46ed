"""An engine for sequences of which the longest is not known yet: it is started with the first, and again, larger, if need be."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import numpy as np

from pipeline.engines.protocol import Request, Scorer
from pipeline.engines.reference import OpenedReference
from pipeline.models.configuration import position_limit
from pipeline.progress import SILENT, Listener, duration


class Growing:
    """`Scorer` of a reference; a context manager. `limit`: tokens that no sequence exceeds, as far as is known.

    `on_ready` is called when the engine was started, and not when it was again: what was scored before counts.
    """

    def __init__(
        self,
        reference: OpenedReference,
        limit: int | None,
        listener: Listener = SILENT,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._reference, self._limit, self._listener, self._on_ready = reference, limit, listener, on_ready
        self._positions = position_limit(reference.paths.base) or sys.maxsize
        self._stack = ExitStack()
        self._scorer: Scorer | None = None
        self._longest = 0
        self._was_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]:
        """See `Scorer.score`."""
        return self.ready(max(map(len, sequences))).score(sequences)

    def ready(self, longest: int) -> Scorer:
        """The engine, started if it is not, or is too small for a sequence of `longest` tokens."""
        if self._scorer is not None and longest <= self._longest:
            return self._scorer
        started, name = time.monotonic(), self._reference.config.engine
        if self._scorer is None:
            self._listener.say(f"starting {name} ...")
        else:
            self._listener.say(f"starting {name} again: a sequence has {longest} tokens, more than {self._longest} ...")
            self.close()
        # rounded up, so that a sequence that is a little longer than those before it starts no engine anew
        self._longest = max(longest, self._limit or min(1 << (longest - 1).bit_length(), self._positions))
        self._scorer = scorer = self._stack.enter_context(self._reference.start(self._longest))
        self._listener.say(f"engine ready after {duration(time.monotonic() - started)}")
        if not self._was_ready:
            self._was_ready = True
            self._on_ready()
        return scorer

    def close(self) -> None:
        """See `Scorer.close`; the next sequence starts it again."""
        self._scorer = None
        self._stack.close()
