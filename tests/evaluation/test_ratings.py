"""Bradley-Terry ratings against a binomial model of another library, and known ratings recovered."""

import numpy as np
import pytest
import statsmodels.api as sm

from pipeline.evaluation.rates.ratings import fit, ratings


def test_the_fit_is_a_binomial_model_without_intercept():
    wins = np.array([[0, 30, 45, 12], [20, 0, 33, 9], [5, 17, 0, 8], [3, 6, 7, 0]], dtype=float)
    rows, share, games = [], [], []
    for first in range(4):
        for second in range(first + 1, 4):
            design = np.zeros(4)
            design[first], design[second] = 1, -1
            rows.append(design[1:])
            games.append(wins[first, second] + wins[second, first])
            share.append(wins[first, second] / games[-1])
    model = sm.GLM(np.array(share), np.array(rows), family=sm.families.Binomial(), var_weights=np.array(games)).fit()
    found = fit(wins, anchor=0, prior=0)
    assert found[0] == 0
    assert found[1:] == pytest.approx(model.params, abs=1e-6)


def test_known_ratings_are_recovered_with_intervals_that_hold_them():
    truth = {"reference": 0.0, "round1": 0.7, "round2": 1.1}
    rng = np.random.default_rng(0)
    scores = {
        str(prompt): {
            (first, second): float(rng.random() < 1 / (1 + np.exp(truth[second] - truth[first])))
            for first, second in (("round1", "reference"), ("round2", "reference"), ("round2", "round1"))
        }
        for prompt in range(800)
    }
    found = ratings(scores, "reference")
    assert next(iter(found)) in ("round1", "round2")
    assert found["reference"].low == found["reference"].high == 0
    for name, value in truth.items():
        assert found[name].low <= value <= found[name].high
        assert found[name].half_width < 0.2


def test_a_model_that_never_lost_has_a_finite_rating():
    found = ratings({str(n): {("a", "b"): 1.0} for n in range(30)}, "b")
    # half a win to each side: odds of 30.5 to 0.5
    assert found["a"].mean == pytest.approx(np.log(61))
