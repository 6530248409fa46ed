"""Bradley-Terry ratings of three or more models from comparisons of every two, with intervals over prompts.

P(a beats b) = sigmoid(rating_a - rating_b); one model is the anchor at 0. Ratings are in nats of log-odds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from pipeline.evaluation.rates.statistics import Interval

_RESAMPLES = 1000
_STEPS = 100
# half a win to each side of every two models that met: ratings stay finite if one never lost
_PRIOR = 0.5

# prompt -> (model, other model) -> score of the first in [0, 1]
Scores = Mapping[str, Mapping[tuple[str, str], float]]


def ratings(scores: Scores, anchor: str, seed: int = 0) -> dict[str, Interval]:
    """Rating of every model relative to `anchor`, highest first; the bootstrap resamples prompts."""
    models = sorted({name for met in scores.values() for two in met for name in two})
    index = {name: index for index, name in enumerate(models)}
    tables = np.zeros((len(scores), len(models), len(models)))
    for row, met in zip(tables, scores.values(), strict=True):
        for (first, second), score in met.items():
            row[index[first], index[second]] += score
            row[index[second], index[first]] += 1 - score
    anchor_index = index[anchor]
    whole = fit(tables.sum(0), anchor_index)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(tables), np.full(len(tables), 1 / len(tables)), size=_RESAMPLES)
    resampled = np.einsum("rp,pab->rab", counts, tables)
    low, high = np.quantile([fit(table, anchor_index) for table in resampled], [0.025, 0.975], axis=0)
    order = sorted(range(len(models)), key=lambda number: (-whole[number], models[number]))
    return {models[n]: Interval(float(whole[n]), float(low[n]), float(high[n])) for n in order}


def comparable(met: Collection[tuple[str, str]], anchor: str) -> bool:
    """Whether every model of the pairs that met is tied to `anchor`, through others if need be: else its rating means nothing."""
    tied = {anchor}
    while more := {name for two in met if tied & {*two} for name in two} - tied:
        tied |= more
    return {name for two in met for name in two} == tied


def fit(wins: np.ndarray, anchor: int, prior: float = _PRIOR) -> np.ndarray:
    """Maximum-likelihood ratings from `wins` [models, models], the row's score over the column, by Newton's method."""
    met = (wins + wins.T) > 0
    table = wins + prior * met
    games = table + table.T
    free = [model for model in range(len(wins)) if model != anchor]
    rating = np.zeros(len(wins))
    for _ in range(_STEPS):
        chance = 0.5 * (1 + np.tanh((rating[:, None] - rating[None, :]) / 2))
        slope = (table - games * chance).sum(1)
        curve = games * chance * (1 - chance)
        hessian = np.diag(curve.sum(1)) - curve
        # least squares: a model that met nobody has no curvature and stays where it is
        step = np.linalg.lstsq(hessian[np.ix_(free, free)], slope[free], rcond=None)[0]
        rating[free] += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return rating
