"""Win rates as they would be if both models wrote responses of the same length.

The model is the small form of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): the chance that the
policy wins is logistic in an intercept and tanh of the standardised length difference, and the figure is that chance at
a difference of 0. The published form also has a term for each of AlpacaEval's own instructions, which other prompts lack.
Its published standard error ignores that the fit itself is uncertain; here the bootstrap goes through the fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.rates.statistics import Interval

_RESAMPLES = 2000
_STEPS = 30
# a weak pull to 0 keeps the coefficients finite if length alone decides every win
_RIDGE = 1e-3
_ELEMENTS = 2_000_000
# each model must be the longer one on this share of the prompts
_OVERLAP = 0.05


def length_controlled(scores: Sequence[float], differences: Sequence[float], seed: int = 0) -> Interval | None:
    """Length-controlled win rate with a bootstrap over prompts through the fit.

    `scores` in [0, 1] and length `differences` (policy minus baseline, any unit), one of each a prompt. None if there
    are fewer than 10 prompts, or if one model is nearly always the longer one: a rate at equal length would then be
    extrapolated from lengths that never met.
    """
    wins, lengths = np.asarray(scores, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if len(wins) < 10 or min((lengths > 0).mean(), (lengths < 0).mean()) < _OVERLAP:
        return None
    bent = np.tanh(lengths / lengths.std())
    whole = fit(np.ones((1, len(wins))), bent, wins)[0, 0]
    rng = np.random.default_rng(seed)
    resampled: list[float] = []
    at_once = max(1, _ELEMENTS // len(wins))
    while len(resampled) < _RESAMPLES:
        number = min(at_once, _RESAMPLES - len(resampled))
        counts = rng.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=number)
        resampled += fit(counts.astype(np.float64), bent, wins)[:, 0].tolist()
    low, high = np.quantile(_chance(np.array(resampled)), [0.025, 0.975])
    return Interval(float(_chance(whole)), float(low), float(high))


def fit(weights: np.ndarray, bent: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Intercept and slope of logistic regressions of soft `scores` on `bent`, one for each row of `weights`: [rows, 2].

    Newton's method on the weighted log-likelihood minus a ridge of 1e-3; all rows step together.
    """
    coefficients = np.zeros((len(weights), 2))
    for _ in range(_STEPS):
        chance = _chance(coefficients[:, :1] + coefficients[:, 1:] * bent)
        residual = weights * (scores - chance)
        curve = weights * chance * (1 - chance)
        slope_0 = residual.sum(1) - _RIDGE * coefficients[:, 0]
        slope_1 = (residual * bent).sum(1) - _RIDGE * coefficients[:, 1]
        a, b, c = curve.sum(1) + _RIDGE, (curve * bent).sum(1), (curve * bent**2).sum(1) + _RIDGE
        step = np.stack([c * slope_0 - b * slope_1, a * slope_1 - b * slope_0], axis=1) / (a * c - b * b)[:, None]
        # near a complete separation a full Newton step overshoots
        coefficients += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    return coefficients


def _chance(logit: np.ndarray) -> np.ndarray:
    # the same as 1 / (1 + exp(-logit)), without overflow
    return np.asarray(0.5 * (1 + np.tanh(logit / 2)))
