"""The length-controlled win rate: the fit is a maximum likelihood, and it takes length out and nothing else."""

import numpy as np
import pytest
import statsmodels.api as sm

from pipeline.evaluation.rates.length_control import fit, length_controlled, saturates, withheld


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
    assert found.n == 600


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
    shown = [found for seed in range(200) if (found := length_controlled(*simulated(80, 0.6, 1.5, seed)))]
    assert len(shown) >= 180
    assert sum(found.low <= truth <= found.high for found in shown) >= 0.9 * len(shown)


def sure(number, bend, seed, shift=1.0):
    """Probabilities of a judge whose log-odds are 0.5 and 2 tanh of `bend` lengths, with a little noise."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(shift, 1.0, number)
    logit = 0.5 + 2 * np.tanh(bend * differences / differences.std()) + 0.3 * rng.normal(size=number)
    return 1 / (1 + np.exp(-logit)), differences


def test_a_judge_that_saturates_is_noticed_and_its_figure_withheld_with_the_reason():
    for seed in range(20):
        scores, differences = sure(300, 6.0, seed)
        assert "another curve" in withheld(scores, differences)
        assert length_controlled(scores, differences) is None


def test_a_judge_that_follows_the_curve_is_taken_for_another_as_rarely_as_promised():
    soft = sum(bool(withheld(*sure(300, 1.0, seed))) for seed in range(200))
    hard = sum(bool(withheld(*simulated(300, 0.5, 1.5, seed))) for seed in range(200))
    assert soft <= 22
    assert hard <= 22


def test_one_curve_goes_through_lengths_of_two_values():
    lengths = np.array([1.0, -1.0] * 20)
    assert saturates((lengths < 0).astype(float), lengths) > 0.05
    assert saturates(np.full(40, 0.5), lengths) == 1.0


def test_each_reason_is_said():
    assert withheld([1.0] * 9, list(range(9))) == "9 prompts are fewer than 10"
    assert withheld([1.0, 0.0] * 20, [3.0] * 40) == "one model is nearly always the longer one"
    assert "equally long" in withheld([1.0, 0.0] * 20, [0.0] * 40)
    assert withheld(*simulated(80, 0.6, 1.5)) == ""
