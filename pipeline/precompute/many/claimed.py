"""A job without a scheduler's pool: any number of processes claim its groups, and none knows of another."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.engines.growing import Growing
from pipeline.engines.protocol import must_run_here
from pipeline.engines.reference import OpenedReference
from pipeline.errors import RefscoreError
from pipeline.precompute.launch import spent
from pipeline.precompute.many.attempts import Claims
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.many.worker import InHand, Worker
from pipeline.precompute.overlap import overlapped
from pipeline.precompute.score import target_of
from pipeline.progress import Listener


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
    job.begin(reference.identity.reference_id)
    groups = sequences = 0
    try:
        for shard in shards:
            job.add(groups, shard)
            groups, sequences = groups + 1, sequences + len(shard)
    finally:
        job.complete(groups)
    return sequences


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
    with (
        listener.progress("scoring", job.groups() or 0) as ticker,
        Growing(reference, limit, listener, lambda: setattr(ticker, "started", time.monotonic())) as engine,
        Claims(job) as claims,
    ):
        worker, own = Worker(job, target, engine), reference.config.model_copy(update={"workers": 1})
        tokens, known, began = 0, 0, time.monotonic()

        def put_away(group: InHand, scores: list[np.ndarray] | None) -> None:
            nonlocal tokens, known
            result = None if scores is None else worker.publish(group, scores)
            claims.end(group.attempt)
            if result is None:
                return
            done.own, tokens = done.own + 1, tokens + result.tokens
            # others go on beside this one
            before, known, of_all = known, len(job.names("done")), job.groups()
            ticker.expect(of_all or known, about=of_all is None)
            now = time.monotonic()
            seconds = now - ticker.started
            text = f"groups  {done.own} here  {tokens / seconds:.0f} tokens/s here"
            if own.price_per_hour and of_all:
                text += f"  {spent(own, now - began, seconds, known / of_all)} spent here"
            ticker.advance(known - before, text)

        try:
            overlapped(map(worker.take, claims.attempts()), worker.score, put_away)
        finally:
            worker.finish()
    for result in _results(job):
        done.groups, done.sequences = done.groups + 1, done.sequences + result.sequences
        done.left_out |= result.left_out
    return done


def _results(job: Job) -> list[Result]:
    found = [job.result(group) for group in job.names("done")]
    return [result for result in found if result is not None]
