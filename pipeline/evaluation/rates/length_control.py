"""Win rates as they would be if both models wrote responses of the same length.

The model is the small form of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): the chance that the
policy wins is logistic in an intercept and tanh of the standardised length difference, and the figure is that chance at
a difference of 0. The published form also has a term for each of AlpacaEval's own instructions, which other prompts lack.
Its published standard error ignores that the fit itself is uncertain; here the bootstrap goes through the fit.

The figure is as right as the curve. A judge that is as sure of a little more length as of much more (it saturates) bends
earlier than tanh of one standard deviation, and the rate at equal length is then biased by more than its interval shows.
Such a judge is noticed by a test of the curve, and its figure withheld.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from pipeline.evaluation.rates.statistics import Interval

_RESAMPLES = 2000
_STEPS = 30
# a weak pull to 0 keeps the coefficients finite if length alone decides every win
_RIDGE = 1e-3
_ELEMENTS = 2_000_000
# each model must be the longer one on this share of the prompts
_OVERLAP = 0.05
_FEWEST = 10
# the curve of a judge that saturates, and how often one that does not may be taken for one
_EARLIER = 4.0
_MISTAKEN = 0.05


def length_controlled(scores: Sequence[float], differences: Sequence[float], seed: int = 0) -> Interval | None:
    """Length-controlled win rate with a bootstrap over prompts through the fit.

    `scores` in [0, 1] and length `differences` (policy minus baseline, any unit), one of each a prompt. None if
    `withheld` gives a reason.
    """
    if withheld(scores, differences):
        return None
    wins, lengths = np.asarray(scores, dtype=np.float64), np.asarray(differences, dtype=np.float64)
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
    return Interval(float(_chance(whole)), float(low), float(high), len(wins))


def withheld(scores: Sequence[float], differences: Sequence[float]) -> str:
    """Why there is no rate at equal length, in words; empty if there is one.

    Too few prompts; lengths that are all equal; one model nearly always the longer one, so that the rate would be extrapolated
    from lengths that never met; or a judge that follows length by another curve than the model's.
    """
    wins, lengths = np.asarray(scores, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if len(wins) < _FEWEST:
        return f"{len(wins)} prompts are fewer than {_FEWEST}"
    if not lengths.any():
        return "the responses of every prompt are equally long, so that the win rate is the one at equal length"
    if min((lengths > 0).mean(), (lengths < 0).mean()) < _OVERLAP:
        return "one model is nearly always the longer one"
    if saturates(wins, lengths / lengths.std()) <= _MISTAKEN:
        return "the judge follows length by another curve than the one that the rate assumes"
    return ""


def saturates(scores: np.ndarray, lengths: np.ndarray) -> float:
    """The p of scores that follow tanh of the standardised `lengths`, against a curve that bends four times as early.

    The score test of one more term, tanh of 4 lengths, in the fitted regression, with the variance estimated from the
    residuals (White 1982), because probabilities spread less around the curve than wins and losses do.
    """
    bent = np.tanh(lengths)
    coefficients = fit(np.ones((1, len(scores))), bent, scores)[0]
    chance = _chance(coefficients[0] + coefficients[1] * bent)
    root = np.sqrt(chance * (1 - chance))
    fitted, further = np.stack([root, root * bent], axis=1), root * np.tanh(_EARLIER * lengths)
    # what the fitted terms leave of the further one, in the fit's own weights
    left = np.tanh(_EARLIER * lengths) - np.stack([np.ones_like(bent), bent], axis=1) @ _least_squares(fitted, further)
    each = (scores - chance) * left
    spread = float((each**2).sum())
    # lengths that differ by one value only have one curve
    return float(stats.chi2.sf(float(each.sum()) ** 2 / spread, 1)) if spread > 1e-9 else 1.0


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


def _least_squares(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.lstsq(terms, values, rcond=None)[0])


def _chance(logit: np.ndarray) -> np.ndarray:
    # the same as 1 / (1 + exp(-logit)), without overflow
    return np.asarray(0.5 * (1 + np.tanh(logit / 2)))
