"""Sequences whose log-probabilities are not finite: they are told from scores that were not computed, tried once more alone, and
left out of the pairs by name, so that one of them does not stop a job.

Engines mark what they computed and found not finite with -inf; NaN means that nothing was computed, which is an engine's fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.engines.protocol import Request
from pipeline.errors import CheckError

# so many sequences without a single finite score are no accident of one of them
_TOO_MANY = 8


class Scores(Protocol):
    """What scores sequences; see `pipeline.engines.protocol.Scorer`."""

    def score(self, sequences: Sequence[Request]) -> list[np.ndarray]: ...


def computed(values: np.ndarray) -> np.ndarray:
    """Values that an engine did compute, float32: those that are no numbers as -inf."""
    marked: np.ndarray = np.where(np.isnan(values), -np.inf, values).astype(np.float32)
    return marked


def score_each(scorer: Scores, sequences: Sequence[Request]) -> list[np.ndarray]:
    """Like `Scorer.score`; what is not finite is scored once more by itself: others in its batch may have spoiled it.

    Raises CheckError if no sequence of many has a finite score.
    """
    scores = scorer.score(sequences)
    doubtful = [number for number, logps in enumerate(scores) if why_quarantined(logps)]
    if len(doubtful) == len(scores) > _TOO_MANY:
        raise CheckError(
            f"none of {len(scores)} sequences has a finite score: the weights are damaged, or the numbers overflow in this "
            "dtype. Try reference.dtype=float32, or bfloat16 instead of float16"
        )
    for number in doubtful if len(scores) > 1 else []:
        scores[number] = scorer.score([sequences[number]])[0]
    return scores


def why_quarantined(logps: np.ndarray) -> str | None:
    """Which value of computed scores is not finite; None if all are, or if some were not computed."""
    infinite = np.isinf(logps)
    if not infinite.any() or np.isnan(logps).any():
        return None
    return f"value {int(np.argmax(infinite))} of {len(logps)} is not finite"


def pairs_left_out(keys: pa.FixedSizeBinaryArray, quarantined: Mapping[bytes, str]) -> dict[int, str]:
    """Pairs with a quarantined side, and which: `keys` are chosen and rejected of each pair."""
    if not quarantined:
        return {}
    hits = pc.is_in(keys, value_set=pa.array(list(quarantined), pa.binary(32))).to_numpy(zero_copy_only=False)
    left_out: dict[int, str] = {}
    for position in np.flatnonzero(hits).tolist():
        side = "rejected" if position % 2 else "chosen"
        left_out.setdefault(position // 2, f"{side}: {quarantined[keys[position].as_py()]}")
    return left_out
