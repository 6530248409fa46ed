"""The gate: before the first step, a policy that starts from the reference's weights must agree with the stored scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.forward.logps import Forward
from pipeline.training.step import Pairs

GATE_PAIRS = 8
# per token, in nats: what float32 and bfloat16 arithmetic may differ by, measured with room to spare. Another model, a
# broken template or a mask off by one differ by several tenths and more.
TOLERANCES = {"float32": (0.001, 0.002), "bfloat16": (0.02, 0.1)}


@torch.no_grad()
def measure_gate(forward: Forward, pairs: Pairs, rows: Sequence[int], numerics: str, beta: float) -> dict[str, object]:
    """Compare the policy's logps before step 1 with the stored reference, on `rows`.

    `numerics` names the coarser of the two arithmetics (a key of TOLERANCES). Differences are policy minus reference, in
    nats per token; margin noise is the root mean square over pairs of the difference of the two sums.
    """
    differences, margins = [], []
    for row in rows:
        chosen, rejected = forward([pairs.trees[row]])[0]
        sides = [
            chosen.double().cpu().numpy() - pairs.ref_chosen_logps[row],
            rejected.double().cpu().numpy() - pairs.ref_rejected_logps[row],
        ]
        differences += sides
        margins.append(float(sides[0].sum() - sides[1].sum()))
    every = np.concatenate(differences)
    signed, absolute = TOLERANCES[numerics]
    mean_signed, mean_absolute = float(every.mean()), float(np.abs(every).mean())
    noise = math.sqrt(float(np.mean(np.square(margins))))
    return {
        "applies": True,
        "passed": bool(abs(mean_signed) <= signed and mean_absolute <= absolute),
        "pairs": len(rows),
        "tokens": len(every),
        "numerics": numerics,
        "mean_signed_difference": mean_signed,
        "mean_absolute_difference": mean_absolute,
        "max_absolute_difference": float(np.abs(every).max()),
        "margin_noise_nats": noise,
        "margin_noise_reward": beta * noise,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }
