"""Stage one: score chosen and rejected under the reference model, once, and write pairs.parquet."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import write_table
from pipeline.config.experiment import Config, without_reference
from pipeline.config.losses import reference_free
from pipeline.engines.quarantine import pairs_left_out
from pipeline.engines.start import start_scorer
from pipeline.errors import CheckError, ConfigError, RefscoreError
from pipeline.models.locate import locate_reference
from pipeline.models.weights import tensor_digests, unread_bytes
from pipeline.precompute.join import dropped_with, write_joined
from pipeline.precompute.pairs_file import about_pairs
from pipeline.precompute.plan import Plan, make_plan, part_of, score_missing
from stages import console

_WORTH_A_BAR = 2**30  # bytes: a second or two of reading


def run(config: Config, run: Run, *, plan_only: bool, shard: str | None = None) -> None:
    """Plan; score what the store lacks; join; write. With `plan_only` the plan is shown and nothing is written.

    `shard` "i/n" scores the i-th of n parts of what is missing and writes nothing but the store: for n processes that
    share one, after which a run without it joins.
    """
    part = _part(shard)
    if reference_free(config.train):
        write_unscored(config, run, plan_only=plan_only)
        return
    _hash_weights(config)
    plan = make_plan(config)
    if part:
        plan = part_of(plan, *part)
    show_plan(plan)
    if plan_only:
        return

    quarantined: dict[bytes, str] = {}
    if len(plan.missing):
        if problem := plan.store.why_not_writable():
            raise RefscoreError(
                f"{len(plan.missing)} of {plan.sequences} sequences must be scored, but the store cannot be written "
                f"({problem}): put a directory of your own first, --set 'reference.store=[data/store, THIS ONE]'"
            )
        plan.store.register(run.directory)
        quarantined = _score(plan, config)
    else:
        console.say("nothing to score: every sequence is in the store; no engine is started")

    if part:
        console.say(
            f"part {shard} is in the store; when all parts are, the same command without --shard writes the pairs"
        )
        _say_quarantined(quarantined, run)
        return
    write_pairs(plan, config, run, quarantined=quarantined)
    console.say(f"pairs     {run.pairs}")
    _say_quarantined(quarantined, run)


def _say_quarantined(quarantined: dict[bytes, str], run: Run) -> None:
    """Raises CheckError if there are any, after all else is done."""
    if quarantined:
        raise CheckError(
            f"{len(quarantined)} sequences have no finite score under this reference, and are not stored. Their pairs are left "
            f"out: {run.dropped} lists them as not_finite, with their token ids. Everything else is scored and written, and "
            "'refscore train' runs on it; another reference.dtype may give them scores"
        )


def _part(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise ConfigError(f"--shard {shard!r}: i/n with i from 0 to n-1, e.g. 0/4")
    return int(found[1]), int(found[2])


def write_unscored(config: Config, run: Run, *, plan_only: bool = False) -> None:
    """Write the pairs of an experiment that compares with no reference: without scores, and without an engine."""
    what = "the reward model" if config.train.objective == "reward" else " + ".join(config.train.loss_type)
    console.say(f"nothing to score: {what} compares nothing with the reference; no engine is started")
    plan = make_plan(without_reference(config))
    show_plan(plan, scored=False)
    if not plan_only:
        write_pairs(plan, without_reference(config), run, scored=False)
        console.say(f"pairs     {run.pairs}")


def write_pairs(
    plan: Plan, config: Config, run: Run, *, scored: bool = True, quarantined: Mapping[bytes, str] | None = None
) -> None:
    """Join scores from the store and write pairs.parquet, dropped.parquet, config.yaml and provenance.json.

    Pairs of `quarantined` keys are dropped as not_finite.
    """
    about = about_pairs(plan, config, scored=scored)
    left_out = pairs_left_out(plan.keys, quarantined or {})
    write_table(run.dropped, dropped_with(plan, left_out))
    write_joined(run.pairs, plan, about, scored=scored, left_out=left_out)
    if scored:
        plan.store.register(run.directory)
    record(
        run,
        config,
        "precompute",
        reference_id=plan.identity.reference_id,
        reference=plan.identity.described(),
        sequences=plan.sequences,
        scored=len(plan.missing) - len(quarantined or {}) if scored else 0,
        not_finite=len(left_out),
        digests={"data": plan.pairs.digests, "reference_weights": plan.identity.model.weights_digest},
    )


def show_plan(plan: Plan, *, scored: bool = True) -> None:
    """Rows, drops, hits, misses and tokens of a plan; not `scored`: rows and drops."""
    pairs = plan.pairs
    for name, format_name in pairs.formats.items():
        console.say(f"data      {name}: {format_name}")
    splits = ", ".join(f"{pairs.splits.get(split, 0)} {split}" for split in ("train", "eval"))
    console.say(f"rows      {len(pairs) + pairs.dropped} read, {len(pairs)} pairs: {splits}")
    for reason, drop in pairs.drops.items():
        detail = f": {drop.first.detail}" if drop.first.detail else ""
        console.say(f"dropped   {drop.count} x {reason} (first: {drop.first.source} row {drop.first.row}{detail})")
    if not scored:
        return
    numerics = plan.identity.numerics
    console.say(
        f"reference {plan.identity.reference_id[:12]}  {numerics.engine} {numerics.engine_version}, "
        f"{numerics.dtype} on {numerics.device}"
    )
    console.say(
        f"store     {plan.sequences} sequences: {plan.sequences - len(plan.missing)} hits, {len(plan.missing)} misses, "
        f"{plan.missing_tokens} tokens to score"
    )


def _hash_weights(config: Config) -> None:
    """Hash weights that were not seen before, with a bar where that takes a while; the plan then finds them known."""
    base = locate_reference(config.reference).base
    unread = unread_bytes(base)
    if unread < _WORTH_A_BAR:
        return
    with console.progress("hashing weights, MiB", unread // 2**20) as ticker:
        tensor_digests(base, lambda read: ticker.advance(read // 2**20, ""))


def _score(plan: Plan, config: Config) -> dict[bytes, str]:
    """Score what is missing; returns the keys of what is not finite, and why."""
    reference = config.reference
    begun = time.monotonic()
    done = tokens = 0
    try:
        with console.progress("scoring", len(plan.missing)) as ticker:

            def on_shard(sequences: int, shard_tokens: int) -> None:
                nonlocal done, tokens
                done, tokens = done + sequences, tokens + shard_tokens
                seconds = time.monotonic() - ticker.started
                ticker.advance(sequences, f"{done / 2 / seconds:.2f} pairs/s  {tokens / seconds:.0f} tokens/s")

            if reference.launcher == "ray":
                from pipeline.precompute import ray

                console.say(f"starting {reference.engine} in {reference.workers} Ray actors ...")
                return ray.score_missing(plan, reference, on_shard)
            console.say(f"starting {reference.engine} ...")
            numerics = plan.identity.numerics
            with start_scorer(reference, plan.paths.merged, numerics, plan.longest_missing) as scorer:
                console.say(f"engine ready after {console.duration(time.monotonic() - begun)}")
                ticker.started = time.monotonic()
                return score_missing(plan, reference, scorer, on_shard)
    except KeyboardInterrupt:
        console.say(
            f"stopped: {done} of {len(plan.missing)} sequences are in the store; the same command goes on from there"
        )
        raise
