"""The length-controlled win rate: the fit is a maximum likelihood, and it takes length out and nothing else."""

import numpy as np
import pytest
import statsmodels.api as sm

from pipeline.evaluation.rates.length_control import fit, length_controlled


def simulated(number, intercept, slope, seed=0):
    rng = np.random.default_rng(seed)
    differences = rng.normal(30, 100, number)
    logit = intercept + slope * np.tanh(differences / differences.std())
    return (rng.random(number) < 1 / (1 + np.exp(-logit))).astype(float), differences


def test_the_fit_is_statsmodels_binomial_model():
    wins, differences = simulated(300, 0.4, 1.5)
    wins[:40] = 0.5  # ties are half a win, half a loss
    bent = np.tanh(differences / differences.std())
    model = sm.GLM(wins, sm.add_constant(bent), family=sm.families.Binomial()).fit()
    assert fit(np.ones((1, 300)), bent, wins)[0] == pytest.approx(model.params, abs=1e-3)


def test_rows_are_fitted_side_by_side_and_weights_are_repetitions():
    wins, differences = simulated(60, 0.2, 1.0)
    bent = np.tanh(differences / differences.std())
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=3).astype(float)
    for row, found in zip(counts, fit(counts, bent, wins), strict=True):
        rows = np.repeat(np.arange(60), row.astype(int))
        assert found == pytest.approx(fit(np.ones((1, 60)), bent[rows], wins[rows])[0], abs=1e-6)


def test_a_judge_of_length_alone_is_even_once_length_is_controlled():
    wins, differences = simulated(600, 0.0, 4.0, seed=1)
    plain, controlled = wins.mean(), length_controlled(wins, differences)
    assert plain > 0.57
    assert controlled.low < 0.5 < controlled.high


def test_a_better_model_stays_better_at_equal_length():
    wins, differences = simulated(600, 1.0, -2.0)
    found = length_controlled(wins, differences)
    assert found.low < 1 / (1 + np.exp(-1.0)) < found.high
    assert found.mean > wins.mean() + 0.05


def test_where_length_decides_every_win_the_figure_is_finite():
    differences = np.linspace(-100, 100, 40)
    found = length_controlled((differences > 0).astype(float), differences)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_nothing_to_control_is_no_figure():
    assert length_controlled([1.0] * 9, list(range(9))) is None
    assert length_controlled([1.0] * 20, [3.0] * 20) is None
    # lengths that never meet: 39 of 40 responses are shorter
    assert length_controlled([1.0, 0.0] * 20, [*range(-39, 0), 5]) is None


def test_the_interval_covers_through_the_fit():
    """200 simulated evaluations of 80 prompts; an interval that ignored the fit's own uncertainty covers far less."""
    truth = 1 / (1 + np.exp(-0.6))
    covered = 0
    for seed in range(200):
        found = length_controlled(*simulated(80, 0.6, 1.5, seed))
        covered += found.low <= truth <= found.high
    assert covered >= 180
