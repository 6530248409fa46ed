"""A job without a scheduler's pool: any number of processes claim its groups, and none knows of another."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.engines.growing import Growing
from pipeline.engines.protocol import must_run_here
from pipeline.engines.reference import OpenedReference
from pipeline.errors import RefscoreError
from pipeline.precompute.launch import spent
from pipeline.precompute.many.attempts import Claims, planning
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.many.worker import InHand, Worker
from pipeline.precompute.overlap import overlapped
from pipeline.precompute.score import target_of
from pipeline.progress import Listener, Ticker
from pipeline.store.places import is_url

# seconds between two counts of what others have done
_LOOK = 5.0


@dataclass
class Done:
    """What came of a job: its groups and sequences, those groups that this process did, and keys of what is not stored, and why."""

    groups: int = 0
    sequences: int = 0
    own: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def write_job(reference: OpenedReference, job: Job, shards: Iterable[pa.Table]) -> int:
    """Write what is missing as a job's groups, each as soon as it is planned; returns how many sequences there are.

    A job that is broken off is complete with what was written: who scores it does not wait for more.
    """
    groups = sequences = 0
    with planning(job, reference.identity.reference_id, store=written_place(reference)):
        try:
            for shard in shards:
                job.add(groups, shard)
                groups, sequences = groups + 1, sequences + len(shard)
        finally:
            job.complete(groups)
    return sequences


def written_place(reference: OpenedReference) -> str:
    """The place that scores of the reference are published to, as every process of this machine would name it."""
    first = reference.config.store[0]
    return first if is_url(first) else str(Path(first).resolve())


def score_claimed(reference: OpenedReference, job: Job, limit: int | None, listener: Listener) -> Done:
    """Score groups of `job` until every one is done, by this process or another.

    `limit`: tokens that no sequence exceeds, if that is known. Raises RefscoreError if the store or the job cannot be written,
    CheckError for scores that cannot be true; what was published before stays, and other processes go on.
    """
    must_run_here(reference.numerics)
    target, done = target_of(reference), Done()
    if problem := target.store.why_not_writable():
        raise RefscoreError(
            f"the store cannot be written ({problem}): put a directory of your own first, --set "
            "'reference.store=[data/store, THIS ONE]'"
        )
    before = len(job.names("done"))
    with (
        listener.progress("scoring", job.groups() or before, before) as ticker,
        Growing(reference, limit, listener, lambda: setattr(ticker, "started", time.monotonic())) as engine,
        Claims(job) as claims,
    ):
        worker, told = Worker(job, target, engine), _Told(reference, job, ticker, before)

        def put_away(group: InHand, scores: list[np.ndarray] | None) -> None:
            result = None if scores is None else worker.publish(group, scores)
            claims.end(group.attempt)
            if result is not None:
                done.own += 1
                told.on_group(result)

        try:
            overlapped(map(worker.take, claims.attempts()), worker.score, put_away)
        finally:
            worker.finish()
    for result in _results(job):
        done.groups, done.sequences = done.groups + 1, done.sequences + result.sequences
        done.left_out |= result.left_out
    return done


class _Told:
    """What is said of the groups, which others score beside this process. `before` were done when it began."""

    def __init__(self, reference: OpenedReference, job: Job, ticker: Ticker, before: int) -> None:
        self._alone, self._job, self._ticker = reference.config.model_copy(update={"workers": 1}), job, ticker
        self._before = self._known = before
        self._own = self._tokens = 0
        self._began, self._looked = time.monotonic(), -_LOOK

    def on_group(self, result: Result) -> None:
        """One more is done here."""
        self._own, self._tokens = self._own + 1, self._tokens + result.tokens
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        # of many thousand groups a list is many requests
        self._looked, before, self._known = now, self._known, len(self._job.names("done"))
        of_all = self._job.groups()
        self._ticker.expect(of_all or self._known, about=of_all is None)
        seconds = now - self._ticker.started
        text = f"groups  {self._own} here  {self._tokens / seconds:.0f} tokens/s here"
        if self._alone.price_per_hour and of_all:
            share = (self._known - self._before) / (of_all - self._before)
            text += f"  {spent(self._alone, now - self._began, seconds, share)} spent here"
        self._ticker.advance(self._known - before, text)


def _results(job: Job) -> list[Result]:
    found = [job.result(group) for group in job.names("done")]
    return [result for result in found if result is not None]
