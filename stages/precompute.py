"""Stage one: score chosen and rejected, or single responses, under the reference model, once, and write pairs.parquet or
responses.parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.engines.protocol import must_compute
from pipeline.engines.reference import open_reference
from pipeline.errors import CheckError, ConfigError
from pipeline.pairs.kinds import UNITS
from pipeline.planning.cautions import warnings_of
from pipeline.precompute.launch import Outcome, score, score_windows
from pipeline.precompute.many.claimed import write_job
from pipeline.precompute.many.job import Job
from pipeline.precompute.pairs_file import table_of, write_pairs, write_unscored
from pipeline.precompute.plan import Plan, Planning, Window
from pipeline.precompute.score import shards_of, target_of
from pipeline.store.adoption import serve_from_adopted
from stages import console
from stages.hashing import hash_weights


def main(config: Config, run: Run, *, plan_only: bool, plan_to: str | None = None) -> None:
    """Plan, and score meanwhile what the store lacks; join; write. With `plan_only` the plan is shown and nothing is written.

    `plan_to`: what is missing is written there instead, for processes of `refscore score-missing`.
    """
    if plan_only and plan_to:
        raise ConfigError(
            "--plan shows what would be scored, --plan-to writes it for 'refscore score-missing': give one"
        )
    if reference_free(config.train):
        if plan_to:
            raise ConfigError(
                "--plan-to: this training compares nothing with the reference, so nothing is to be scored"
            )
        write_unscored(config, run, console.working, plan_only=plan_only, remarks=partial(warnings_of, config))
        if config.train.on_samples:
            console.say("          the table has the held-out prompts, without scores, for 'refscore eval'")
            console.say(
                "next      'refscore rollout' with the same configuration and run makes samples, rewards and scores"
            )
        return
    reference = open_reference(config.reference)
    hash_weights(reference)
    planning = Planning(config, reference)
    if not plan_only:
        planning.register(run.directory)
    if plan_to:
        must_compute(reference.numerics)
        job, target = Job(plan_to), target_of(reference)
        missing = (serve_from_adopted(target.store, window.missing) for window in _with_the_plan(planning, config))
        sequences = write_job(reference, job, shards_of(reference, missing))
        console.say(f"job       {plan_to}: {sequences} sequences to score")
        console.say(
            f"next      'refscore score-missing {plan_to}' with the same configuration, in as many processes as there are devices"
        )
        return
    if plan_only or reference.config.imported_by:
        plan = planning.plan()
        _say(plan, config)
        if plan_only:
            return
        outcome = Outcome(quarantined=score(plan, run.directory, console.working))
    else:
        windows = _with_the_plan(planning, config)
        outcome = score_windows(reference, windows, run.directory, console.working, config.data.max_length)
    plan, quarantined = planning.plan(), outcome.quarantined
    write_pairs(plan, config, run, newly=outcome.sequences - len(quarantined), quarantined=quarantined)
    table = table_of(run, config)
    console.say(f"{table.stem:9} {table}")
    if quarantined:
        finite = all("is not finite" in why for why in quarantined.values())
        what = "no finite score under this reference" if finite else "no finite score, or broke the engine each time"
        units, ids = UNITS[plan.data], ", with their token ids" if plan.pairs.of_pairs else ""
        raise CheckError(
            f"{len(quarantined)} sequences have {what}, and are not stored. Their {units} are left "
            f"out: {run.dropped} lists them as not_finite{ids}. Everything else is scored and written, and "
            "'refscore train' runs on it; another reference.dtype may give them scores"
        )


def _with_the_plan(planning: Planning, config: Config) -> Iterator[Window]:
    """The windows; says the plan as soon as all is read, which for small data is before anything is scored."""
    before = 0
    for window in planning.windows():
        if window.share >= 1:
            _say(planning.plan(), config)
            if before:
                console.say(f"          {before + len(window.missing)} of these were missing when their rows were read")
        elif not before and len(window.missing):
            console.say(f"data      {window.share:.0%} is read, and planning goes on while this is scored")
        before += len(window.missing)
        yield window


def _say(plan: Plan, config: Config) -> None:
    for line in [*plan.lines(), *warnings_of(config, plan)]:
        console.say(line)
