"""How far two sets of scores of the same pairs differ, and how far arithmetic alone may take them apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# per token, in nats, of means with and without sign: what float32 and bfloat16 arithmetic may differ by, measured with room
# to spare. Another model, a broken template or a mask off by one differ by several tenths and more.
TOLERANCES = {"float32": (0.001, 0.002), "bfloat16": (0.02, 0.1)}
# of a single value, as one that was never computed is lost in a mean; nats, above what arithmetic alone was seen to give
LARGEST = {"float32": 0.001, "bfloat16": 2.0}


def agreement(
    scores: Sequence[np.ndarray], truth: Sequence[np.ndarray], beta: float, *, of_pairs: bool = True
) -> dict[str, float]:
    """How far `scores` are from `truth`; both hold chosen and rejected of each pair in turn, or responses that stand alone.

    `correlation_with_length` is between a response's summed difference, with its sign, and its tokens; margin noise is the
    root mean square over pairs of the difference of the two sums; of responses that stand alone, of their sums.
    """
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(scores, truth, strict=True)]
    every = np.concatenate(differences)
    sums = np.array([difference.sum() for difference in differences])
    noise = _noise(sums, of_pairs=of_pairs)
    return {
        "tokens": len(every),
        "mean_signed_difference": float(every.mean()),
        "mean_absolute_difference": float(np.abs(every).mean()),
        "max_absolute_difference": float(np.abs(every).max()),
        "max_sequence_difference": float(np.abs(sums).max()),
        "correlation_with_length": _correlation(sums, np.array([len(values) for values in differences])),
        "margin_noise_nats": noise,
        "margin_noise_reward": beta * noise,
    }


def agreement_of_sums(
    sums: Sequence[float], truth: Sequence[float], tokens: Sequence[int], beta: float, *, of_pairs: bool = True
) -> dict[str, float]:
    """Like `agreement`, if only a sum per response is known: differences per token are each response's mean.

    Its largest is that of a response's difference over the root of its tokens, which is what noise of single values adds up to.
    """
    differences, lengths = np.subtract(sums, truth), np.array(tokens)
    noise = _noise(differences, of_pairs=of_pairs)
    return {
        "tokens": int(lengths.sum()),
        "mean_signed_difference": float(differences.sum() / lengths.sum()),
        "mean_absolute_difference": float(np.abs(differences).sum() / lengths.sum()),
        "max_absolute_difference": float((np.abs(differences) / np.sqrt(lengths)).max()),
        "max_sequence_difference": float(np.abs(differences).max()),
        "correlation_with_length": _correlation(differences, lengths),
        "margin_noise_nats": noise,
        "margin_noise_reward": beta * noise,
    }


def _noise(sums: np.ndarray, *, of_pairs: bool) -> float:
    compared = sums[0::2] - sums[1::2] if of_pairs else sums
    return float(np.sqrt(np.mean(compared**2)))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else 0.0
