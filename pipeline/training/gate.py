"""The gate: before the first step, a policy that starts from the reference's weights must agree with the stored scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.forward.logps import Forward
from pipeline.precompute.agreement import TOLERANCES, agreement
from pipeline.training.step import Pairs

GATE_PAIRS = 8


@torch.no_grad()
def measure_gate(forward: Forward, pairs: Pairs, rows: Sequence[int], numerics: str, beta: float) -> dict[str, object]:
    """Compare the policy's logps before step 1 with the stored reference, on `rows`.

    `numerics` names the coarser of the two arithmetics (a key of TOLERANCES). Differences are policy minus reference; see
    `pipeline.precompute.agreement`.
    """
    scores, stored = [], []
    for row in rows:
        scores += [logps.double().cpu().numpy() for logps in forward([pairs.trees[row]])[0]]
        stored += [pairs.ref_chosen_logps[row], pairs.ref_rejected_logps[row]]
    figures = agreement(scores, stored, beta)
    signed, absolute = TOLERANCES[numerics]
    passed = abs(figures["mean_signed_difference"]) <= signed and figures["mean_absolute_difference"] <= absolute
    return {
        "applies": True,
        "passed": bool(passed),
        "pairs": len(rows),
        "numerics": numerics,
        **figures,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }
