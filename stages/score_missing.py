"""`refscore score-missing PLACE`: one of several processes that score what `refscore precompute --plan-to PLACE` wrote."""

from __future__ import annotations

import time

from pipeline.config.experiment import Config
from pipeline.engines.reference import open_reference
from pipeline.errors import ConfigError
from pipeline.precompute.many.claimed import score_claimed, written_place
from pipeline.precompute.many.job import Job
from pipeline.progress import duration
from stages import console
from stages.hashing import hash_weights


def main(place: str, config: Config) -> None:
    """Claim groups and score them until all are done, by whomever; publishes to the store and writes nothing else."""
    started, job = time.monotonic(), Job(place)
    reference = open_reference(config.reference)
    hash_weights(reference)
    wanted, here = job.reference_id(), reference.identity.reference_id
    if here != wanted:
        raise ConfigError(
            f"{place} is a job for reference {wanted[:12]}, and this configuration's is {here[:12]}: give the configuration that "
            "planned it, and the same versions of engine and model. 'refscore store explain' says what differs"
        )
    console.say(f"reference {here[:12]}  {reference.numerics.words}")
    planned, store = job.store(), written_place(reference)
    if planned not in (None, store):
        console.say(
            f"store     {store}, while the plan was made against {planned}: if these are two, 'refscore precompute' finds nothing "
            "of this there"
        )
    done = score_claimed(reference, job, config.data.max_length, console.working)
    console.say(f"done      {done.own} groups here, {done.groups} in all ({duration(time.monotonic() - started)})")
    for key, why in done.left_out.items():
        console.say(f"left out  {key[:12]} ...: {why}")
    if done.left_out:
        console.say(
            f"          {len(done.left_out)} sequences of {done.sequences} are not stored: 'refscore precompute' with the same "
            "configuration tries them once more, and leaves out by name what has no score"
        )
    else:
        console.say("next      'refscore precompute' with the same configuration finds all in the store, and joins it")
