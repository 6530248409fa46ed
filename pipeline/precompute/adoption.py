"""May scores that an earlier reference computed stand for today's? A sample of them, scored again by today's engine, says.

Both must be the same model, to the last byte of its weights: only how the numbers are computed may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts.tables import arrays_of
from pipeline.engines.protocol import must_compute
from pipeline.engines.reference import OpenedReference
from pipeline.errors import CheckError, ConfigError, DataError
from pipeline.precompute.agreement import LARGEST, TOLERANCES
from pipeline.precompute.explain import differences
from pipeline.precompute.plan import Plan
from pipeline.precompute.score import check_scores
from pipeline.precompute.verify import Sample
from pipeline.store.adoption import Adoption, held_of_its_own
from pipeline.store.identity import IMPORTED, ReferenceIdentity, keys_of
from pipeline.store.places import is_url
from pipeline.store.transfer import described_references


def find_reference(prefix: str, stores: Sequence[str]) -> ReferenceIdentity:
    """The reference in `stores` whose id begins with `prefix`. Raises DataError if there is none, or more than one."""
    # the first place is made when something is published
    there = [place for place in stores if place != stores[0] or is_url(place) or Path(place).expanduser().is_dir()]
    held = {name: identity for place in there for name, identity in described_references(place).items()}
    found = [name for name in held if name.startswith(prefix)]
    if len(found) != 1:
        how = f"{len(found)} references begin with {prefix!r}" if found else f"no reference begins with {prefix!r}"
        raise DataError(f"{how} in {', '.join(stores)}: 'refscore store ls' lists what each holds")
    return held[found[0]]


def must_be_adoptable(adopted: ReferenceIdentity, by: ReferenceIdentity) -> None:
    """Raise ConfigError if scores of `adopted` may not stand for those of `by`, however well a sample agrees."""
    name = adopted.reference_id[:12]
    if adopted == by:
        raise ConfigError(f"{name} is this configuration's own reference: its scores are found without being adopted")
    must_compute(by.numerics)
    if adopted.numerics.engine == IMPORTED:
        raise ConfigError(
            f"{name} was imported by {adopted.numerics.imported_by!r}: to train on these scores set reference.engine=imported, "
            "'refscore verify' then compares a sample"
        )
    if adopted.numerics.logps and not by.numerics.logps:
        raise ConfigError(
            f"{name} keeps logps in fixed point, and this configuration asks for exact ones: set reference.logps=fixed_point"
        )
    if adopted.model != by.model:
        numerics = {"numerics": by.numerics.described()}
        words = "; ".join(differences({**adopted.described(), **numerics}, by.described()))
        raise ConfigError(f"{name} is another model, whose scores cannot stand for this one's: {words}")


def draw_stored(plan: Plan, adopted: ReferenceIdentity, rows: int) -> Sample:
    """`rows` rows of the plan of which `adopted` computed every side, drawn always alike, with its scores of them.

    Raises DataError if there is none.
    """
    keys = [keys_of(adopted.reference_id, table) for _, table in plan.pairs.groups(plan.pairs.ids)]
    lookup, sides = plan.store.of(adopted).lookup(pa.concat_arrays(keys)), len(plan.sides)
    stored: dict[int, np.ndarray] = {}
    positions = np.empty(0, dtype=np.int64)
    # what turns out damaged when it is read is held no longer
    while not len(positions) or len(stored) < len(positions):
        numbers, counts = np.unique(held_of_its_own(lookup) // sides, return_counts=True)
        whole = numbers[counts == sides]
        if not len(whole):
            raise DataError(
                f"{adopted.reference_id[:12]} computed no score of this configuration's data that can be compared: name a "
                "configuration whose data it scored, with the same tokens"
            )
        chosen = np.sort(np.random.default_rng(0).choice(whole, min(rows, len(whole)), replace=False))
        positions = (sides * chosen[:, None] + np.arange(sides)).ravel()
        stored = {}
        for these, table in lookup.rows(positions):
            stored |= dict(zip(these.tolist(), arrays_of(table, "logps"), strict=True))
    requests = [plan.request(int(position)) for position in positions]
    return Sample(requests, [stored[int(position)] for position in positions], [], sides)


def score_again(reference: OpenedReference, sample: Sample) -> list[np.ndarray]:
    """Today's scores of the sample, by one engine. Raises CheckError for scores that cannot be true or are not finite."""
    with reference.start(max(map(len, sample.requests))) as scorer:
        scores = scorer.score(sample.requests)
    _, quarantined = check_scores([b""] * len(scores), sample.requests, scores)
    if quarantined:
        raise CheckError(
            f"today's engine gives scores that are not finite ({quarantined[b'']}): nothing can be compared"
        )
    return scores


def limits(dtype: str, absolute: float | None = None) -> dict[str, float]:
    """What each figure of `pipeline.precompute.agreement` may be: by default what arithmetic in `dtype` may differ by.

    `absolute` is another limit of the mean absolute difference; the others are then in proportion to it as in bfloat16.
    """
    kind = "float32" if dtype == "float32" and absolute is None else "bfloat16"
    signed, usual = TOLERANCES[kind]
    scale = 1.0 if absolute is None else absolute / usual
    return {
        "mean_signed_difference": scale * signed,
        "mean_absolute_difference": scale * usual,
        "max_absolute_difference": scale * LARGEST[kind],
    }


def judged(
    adopted: ReferenceIdentity, by: ReferenceIdentity, figures: Mapping[str, float], tolerance: Mapping[str, float]
) -> Adoption:
    """The adoption, if every figure keeps its limit. Raises CheckError if one does not."""
    beyond = [
        f"{name.replace('_', ' ')} {figures[name]:.2g} (allowed {limit:.2g})"
        for name, limit in tolerance.items()
        if not abs(figures[name]) <= limit
    ]
    if beyond:
        raise CheckError(
            f"not adopted: the scores of {adopted.reference_id[:12]} ({adopted.numerics.words}) differ from those of "
            f"{by.numerics.words} by more than the tolerance, nats per token: {', '.join(beyond)}. 'refscore precompute' scores "
            "them anew; --tolerance allows more"
        )
    return Adoption(adopted, by, dict(figures), dict(tolerance), datetime.now(UTC).isoformat(timespec="seconds"))
