"""Who hears how long work goes on: lines, and progress by units done. Nobody, unless a listener is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Ticker(Protocol):
    """Progress of one task; `started` is its beginning in seconds of `time.monotonic`, and may be set anew."""

    started: float

    def advance(self, units: int, text: str) -> None:
        """`units` more are done; `text` describes the state."""
        ...

    def advance_tokens(self, units: int, tokens: int) -> None:
        """`units` more are done, of `tokens` tokens together."""
        ...

    def expect(self, total: int, *, about: bool) -> None:
        """The task has `total` units, or `about` so many, as is known by now."""
        ...


class Listener(Protocol):
    """What hears of long work; `stages.console.working` is one."""

    def say(self, text: str) -> None:
        """A line for people."""
        ...

    def progress(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Ticker]:
        """A task of `total` units begins, or goes on after `done` of them."""
        ...


class _SilentTicker:
    def __init__(self) -> None:
        self.started = time.monotonic()

    def advance(self, units: int, text: str) -> None: ...

    def advance_tokens(self, units: int, tokens: int) -> None: ...

    def expect(self, total: int, *, about: bool) -> None: ...


class _Silent:
    def say(self, text: str) -> None: ...

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Ticker]:  # noqa: ARG002  # the protocol's names
        yield _SilentTicker()


SILENT: Listener = _Silent()


def duration(seconds: float) -> str:
    """A time span as people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
