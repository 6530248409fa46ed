"""Stage one: score chosen and rejected, or single responses, under the reference model, once, and write pairs.parquet or
responses.parquet.
"""

from __future__ import annotations

import re
from functools import partial

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.engines.reference import open_reference
from pipeline.errors import CheckError, ConfigError
from pipeline.pairs.kinds import UNITS
from pipeline.planning.cautions import warnings_of
from pipeline.precompute.launch import score
from pipeline.precompute.pairs_file import table_of, write_pairs, write_unscored
from pipeline.precompute.plan import make_plan, part_of
from stages import console
from stages.hashing import hash_weights


def main(config: Config, run: Run, *, plan_only: bool, shard: str | None = None) -> None:
    """Plan; score what the store lacks; join; write. With `plan_only` the plan is shown and nothing is written.

    `shard` "i/n" scores the i-th of n parts of what is missing and writes nothing but the store: for n processes that
    share one, after which a run without it joins.
    """
    part = _part(shard)
    if reference_free(config.train):
        write_unscored(config, run, console.working, plan_only=plan_only, remarks=partial(warnings_of, config))
        if config.train.on_samples:
            console.say("          the table has the held-out prompts, without scores, for 'refscore eval'")
            console.say(
                "next      'refscore rollout' with the same configuration and run makes samples, rewards and scores"
            )
        return
    reference = open_reference(config.reference)
    hash_weights(reference)
    plan = make_plan(config, reference)
    if part:
        plan = part_of(plan, *part)
    for line in [*plan.lines(), *warnings_of(config, plan)]:
        console.say(line)
    if plan_only:
        return

    quarantined = score(plan, run.directory, console.working)
    table = table_of(run, config)

    if part:
        console.say(
            f"part {shard} is in the store; when all parts are, the same command without --shard writes {table.name}"
        )
    else:
        write_pairs(plan, config, run, quarantined=quarantined)
        console.say(f"{table.stem:9} {table}")
    if quarantined:
        units, ids = UNITS[plan.data], ", with their token ids" if plan.pairs.of_pairs else ""
        raise CheckError(
            f"{len(quarantined)} sequences have no finite score under this reference, and are not stored. Their {units} are left "
            f"out: {run.dropped} lists them as not_finite{ids}. Everything else is scored and written, and "
            "'refscore train' runs on it; another reference.dtype may give them scores"
        )


def _part(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not numbers or not int(numbers[1]) < int(numbers[2]):
        raise ConfigError(f"--shard {shard!r}: i/n with i from 0 to n-1, e.g. 0/4")
    return int(numbers[1]), int(numbers[2])
