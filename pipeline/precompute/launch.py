"""Scoring what a plan misses with the engine that is configured: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.config.experiment import ReferenceConfig
from pipeline.errors import DataError, RefscoreError
from pipeline.precompute.plan import Plan, serve_adopted
from pipeline.precompute.score import score_missing
from pipeline.progress import SILENT, Listener, duration


def score(plan: Plan, directory: Path | None = None, listener: Listener = SILENT) -> dict[bytes, str]:
    """Score what is missing and publish it to the store; starts no engine if nothing is.

    `directory`: that of the run which will use the scores, so that the store keeps them for it. Returns the keys of
    sequences whose scores are not finite, and why: they are not stored. Raises RefscoreError if the store cannot be
    written, DataError if scores are imported and some are missing, CheckError for scores that cannot be true. What was
    published before an error or Ctrl-C stays.
    """
    serve_adopted(plan)
    if not len(plan.missing):
        whose = f", {plan.identity.numerics.words}" if plan.imported else ""
        listener.say(f"nothing to score: every sequence is in the store{whose}; no engine is started")
        return {}
    if plan.imported:
        raise DataError(plan.not_imported())
    if problem := plan.store.why_not_writable():
        raise RefscoreError(
            f"{len(plan.missing)} of {plan.sequences} sequences must be scored, but the store cannot be written "
            f"({problem}): put a directory of your own first, --set 'reference.store=[data/store, THIS ONE]'"
        )
    if directory is not None:
        plan.store.register(directory)
    started = time.monotonic()
    done = tokens = 0
    reference = plan.reference.config
    sides, rows = len(plan.sides), "pairs" if plan.pairs.of_pairs else "responses"
    try:
        with listener.progress("scoring", len(plan.missing)) as ticker:

            def on_shard(sequences: int, shard_tokens: int) -> None:
                nonlocal done, tokens
                done, tokens = done + sequences, tokens + shard_tokens
                seconds = time.monotonic() - ticker.started
                text = f"{done / sides / seconds:.2f} {rows}/s  {tokens / seconds:.0f} tokens/s"
                if reference.price_per_hour:
                    text += f"  {spent(reference, time.monotonic() - started, seconds, done / len(plan.missing))} spent"
                ticker.advance(sequences, text)

            if reference.launcher == "ray":
                from pipeline.precompute import ray as cluster

                listener.say(f"starting {reference.engine} in {reference.workers} Ray actors ...")
                return cluster.score_missing(plan, on_shard)
            listener.say(f"starting {reference.engine} ...")
            with plan.reference.start(plan.longest_missing) as scorer:
                listener.say(f"engine ready after {duration(time.monotonic() - started)}")
                ticker.started = time.monotonic()
                return score_missing(plan, scorer, on_shard)
    except KeyboardInterrupt:
        listener.say(
            f"stopped: {done} of {len(plan.missing)} sequences are in the store; the same command goes on from there"
        )
        raise


def spent(reference: ReferenceConfig, seconds: float, scoring: float, done: float) -> str:
    """What all devices of the reference's engines have cost and will have, "0.12 of about 0.50", in `price_per_hour`'s currency.

    `seconds` since they were started, `scoring` of which a share of `done` was scored in.
    """
    per_second = reference.price_per_hour * reference.workers * reference.tensor_parallel_size / 3600
    return f"{per_second * seconds:.2f} of about {per_second * (seconds + scoring * (1 - done) / done):.2f}"
