"""`refscore store adopt`: may scores that an earlier reference computed stand for today's? If a sample agrees, it is recorded."""

from __future__ import annotations

import math

from pipeline.artifacts.runs import existing_runs, open_run
from pipeline.artifacts.schemas import COMPUTED_BY
from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.engines.reference import open_reference
from pipeline.errors import ConfigError, RefscoreError
from pipeline.precompute.adoption import draw_stored, find_reference, judged, limits, must_be_adoptable, score_again
from pipeline.precompute.plan import make_plan
from pipeline.store.adoption import adopt, revoke
from pipeline.store.store import Store
from stages import console
from stages.hashing import hash_weights
from stages.verify import SHOWN


def main(config: Config, prefix: str, rows: int, tolerance: float | None) -> None:
    """Compare `rows` pairs, or responses, that the reference `prefix` scored; record it if they agree, else raise CheckError.

    `tolerance`: of the mean absolute difference, nats per token; None: what arithmetic in the reference's dtype may differ by.
    """
    if reference_free(config.train):
        raise ConfigError("this training compares nothing with the reference: name a configuration whose training does")
    if tolerance is not None and not math.isfinite(tolerance):
        raise ConfigError(f"--tolerance {tolerance}: a number of nats per token, e.g. 0.01")
    alone = config.reference.model_copy(update={"workers": 1, "launcher": "local"})
    reference = open_reference(alone)
    hash_weights(reference)
    adopted, today = find_reference(prefix, alone.store), reference.identity
    must_be_adoptable(adopted, today)
    plan = make_plan(config.model_copy(update={"reference": alone}), reference)
    sample = draw_stored(plan, adopted, rows)
    if problem := plan.store.why_not_writable():
        raise RefscoreError(
            f"an adoption is recorded in the first place of reference.store, which cannot be written ({problem})"
        )
    console.say(f"earlier   {adopted.reference_id[:12]}  {adopted.numerics.words}")
    console.say(f"today     {today.reference_id[:12]}  {today.numerics.words}")
    if sample.rows < rows:
        console.say(
            f"          it computed no more than {sample.rows} {sample.unit} of this data: a sample of {rows} says more"
        )
    console.say(f"scoring {sample.rows} {sample.unit} with {alone.engine} {today.numerics.dtype} ...")

    figures = sample.against(score_again(reference, sample), config.train.beta)
    allowed = limits(today.numerics.dtype, tolerance)
    console.table(
        f"Earlier minus today, {sample.rows} {sample.unit}, {figures['tokens']} response tokens; nats per token, margins in nats",
        ["", *SHOWN.values()],
        [
            [name, *(f"{of[key]:.2g}" if key in of else "" for key in SHOWN)]
            for name, of in (("difference", figures), ("allowed", allowed))
        ],
    )
    adopt(plan.store, judged(adopted, today, figures, allowed))
    console.say(
        f"adopted   scores of {adopted.reference_id[:12]} now stand for those of {today.reference_id[:12]} where the latter are "
        "missing; 'refscore precompute' takes them over"
    )


def take_back(config: Config, prefix: str) -> None:
    """Take back an adoption, and the scores that were taken over by it."""
    reference = open_reference(config.reference)
    hash_weights(reference)
    today = reference.identity.reference_id
    revoked = revoke(Store(config.reference.store, reference.identity), prefix)
    name = revoked.adopted[:12]
    console.say(
        f"revoked   the adoption of {name}; {revoked.rows:,} sequences that were taken over are removed from {today[:12]}, and "
        f"{name} keeps its own"
    )
    for place in revoked.elsewhere:
        console.say(f"          {place} records the same adoption, so that it still holds: take it back there too")
    if runs := _made_with(revoked.adopted, today):
        console.say(
            f"          made with them: {', '.join(runs)}; 'refscore precompute' of such a run scores anew what its pairs had from "
            f"{name}"
        )


def _made_with(adopted: str, today: str) -> list[str]:
    """The runs here whose scores of the reference `today` are in part those of `adopted`."""
    abouts = {name: read_about(open_run(name).scored) for name in existing_runs()}
    return [
        name
        for name, about in abouts.items()
        if about.get("reference_id") == today and adopted in about.get(COMPUTED_BY, {})
    ]
