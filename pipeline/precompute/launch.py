"""Scoring what is missing with the engine that is configured: in this process, or in several actors of Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.growing import Growing
from pipeline.engines.protocol import must_compute
from pipeline.engines.reference import OpenedReference
from pipeline.errors import DataError, RefscoreError
from pipeline.precompute.overlap import Ahead
from pipeline.precompute.plan import Plan, Window
from pipeline.precompute.score import Target, lengths_in, score_shards, shards_of, target_of, windows_of
from pipeline.progress import SILENT, Listener, Ticker
from pipeline.store.adoption import serve_from_adopted

# windows of which what is read later is taken to be like
_LATEST = 8


@dataclass
class Outcome:
    """What scoring came to: sequences and tokens that were scored, those that were adopted instead, and the keys of those whose
    scores are not finite, and why: they are not stored.
    """

    sequences: int = 0
    tokens: int = 0
    adopted: int = 0
    quarantined: dict[bytes, str] = field(default_factory=dict)


def score(plan: Plan, directory: Path | None = None, listener: Listener = SILENT) -> dict[bytes, str]:
    """Score what `plan` misses and publish it to the store; starts no engine if nothing is.

    Returns the keys of sequences whose scores are not finite, and why. Raises like `score_windows`, and DataError if scores are
    imported and some are missing.
    """
    if len(plan.missing) and plan.imported:
        raise DataError(plan.not_imported())
    longest = plan.longest_missing or None
    return score_windows(plan.reference, windows_of(plan), directory, listener, longest).quarantined


def score_windows(
    reference: OpenedReference,
    windows: Iterable[Window],
    directory: Path | None = None,
    listener: Listener = SILENT,
    limit: int | None = None,
) -> Outcome:
    """Score what the windows lack and publish it to the store, while further windows are planned; starts no engine if nothing is.

    `directory`: that of the run which will use the scores, so that the store keeps them for it. `limit`: tokens that no
    sequence exceeds, if that is known. Raises RefscoreError if the store cannot be written, ConfigError if scores are imported,
    CheckError for scores that cannot be true. What was published before an error or Ctrl-C stays.
    """
    windows, outcome, read = iter(windows), Outcome(), 0.0
    for window in windows:
        if len(window.missing):
            _score(reference, window, windows, outcome, directory, listener, limit, read)
            break
        read = window.share
    if not outcome.sequences:
        words = f", {reference.numerics.words}" if reference.config.imported_by else ""
        listener.say(f"nothing to score: every sequence is in the store{words}; no engine is started")
    if outcome.adopted:
        listener.say(f"adopted   {outcome.adopted} scores that an earlier reference computed")
    return outcome


def _score(
    reference: OpenedReference,
    first: Window,
    others: Iterator[Window],
    outcome: Outcome,
    directory: Path | None,
    listener: Listener,
    limit: int | None,
    read: float,
) -> None:
    must_compute(reference.numerics)
    target = target_of(reference)
    if problem := target.store.why_not_writable():
        raise RefscoreError(
            f"{len(first.missing)} sequences and more must be scored, but the store cannot be written ({problem}): put a "
            "directory of your own first, --set 'reference.store=[data/store, THIS ONE]'"
        )
    if directory is not None:
        target.store.register(directory)
    if first.share >= 1:
        limit = int(lengths_in(first.missing).max())
    with listener.progress("scoring", len(first.missing)) as ticker:
        told = _Told(target, outcome, ticker, read)
        missing = told.still_missing(chain([first], others))
        try:
            if reference.config.in_actors:
                from pipeline.precompute.many import ray as cluster

                shards = shards_of(reference, missing)
                outcome.quarantined |= cluster.score_shards(target, shards, limit, told.on_shard, listener)
            else:
                # the next window is planned while all shards of this one are scored
                with Growing(reference, limit, listener, told.begin_anew) as scorer, Ahead(missing) as planned:
                    outcome.quarantined |= score_shards(target, shards_of(reference, planned), scorer, told.on_shard)
        except KeyboardInterrupt:
            listener.say(
                f"stopped: {outcome.sequences} of {told.of_all} sequences are in the store; the same command goes on from there"
            )
            raise
        finally:
            target.store.finish()


class _Told:
    """What is said of the scoring while it goes on: counts it, and forecasts from what is planned by now."""

    def __init__(self, target: Target, outcome: Outcome, ticker: Ticker, read: float) -> None:
        self._target, self._outcome, self._ticker = target, outcome, ticker
        self._missing, self._expected, self._share = 0, 0, read
        self._latest: deque[tuple[int, float]] = deque(maxlen=_LATEST)
        self._began = time.monotonic()

    @property
    def of_all(self) -> str:
        """How many sequences there are to score, for people."""
        return f"{self._missing}" if self._share >= 1 else f"about {self._expected}"

    def begin_anew(self) -> None:
        """The engine scores from now on."""
        self._ticker.started = time.monotonic()

    def still_missing(self, windows: Iterable[Window]) -> Iterator[pa.Table]:
        """What the windows lack and no adopted reference has; each makes the forecast better."""
        for window in windows:
            table = serve_from_adopted(self._target.store, window.missing)
            self._outcome.adopted += len(window.missing) - len(table)
            self._latest.append((len(table), window.share - self._share))
            self._missing, self._share = self._missing + len(table), window.share
            # what is not read yet is like what was read last: if a run was interrupted, all before that may be in the store
            missing, read = map(sum, zip(*self._latest, strict=True))
            self._expected = round(self._missing + (missing / read * (1 - self._share) if read else 0))
            self._ticker.expect(self._expected, about=self._share < 1)
            yield table

    def on_shard(self, sequences: int, tokens: int) -> None:
        """So many more are in the store."""
        done = self._outcome
        done.sequences, done.tokens = done.sequences + sequences, done.tokens + tokens
        now = time.monotonic()
        seconds = now - self._ticker.started
        text = f"{done.sequences / seconds:.2f} sequences/s  {done.tokens / seconds:.0f} tokens/s"
        config = self._target.reference.config
        if config.price_per_hour:
            text += f"  {spent(config, now - self._began, seconds, done.sequences / self._expected)} spent"
        self._ticker.advance(sequences, text)


def spent(reference: ReferenceConfig, seconds: float, scoring: float, done: float) -> str:
    """What all devices of the reference's engines have cost and will have, "0.12 of about 0.50", in `price_per_hour`'s currency.

    `seconds` since they were started, `scoring` of which a share of `done` was scored in.
    """
    per_second = reference.price_per_hour * reference.workers * reference.tensor_parallel_size / 3600
    return f"{per_second * seconds:.2f} of about {per_second * (seconds + scoring * (1 - done) / done):.2f}"
