"""What `make frontier` computes itself: the best of n over all draws, and pairs with exchanged labels."""

import itertools

import numpy as np
import pytest

from tests.benchmarks.frontier import BEST_OF, expected_best, half_of, swapped


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_every_draw_with_equals_sharing(n):
    by, of = np.array([[1.0, 3.0, 3.0, 0.0, 2.0]]), np.array([[5.0, 1.0, 2.0, 9.0, 4.0]])
    draws = []
    for draw in itertools.combinations(range(5), n):
        best = max(by[0, place] for place in draw)
        draws.append(np.mean([of[0, place] for place in draw if by[0, place] == best]))
    assert expected_best(by, of, n) == pytest.approx(np.mean(draws))


def test_the_best_of_more_is_never_less_by_its_own_reward():
    rewards = np.random.default_rng(0).integers(0, 5, (7, max(BEST_OF))) / 4
    means = [expected_best(rewards, rewards, n) for n in BEST_OF]
    assert means == sorted(means)
    assert means[0] == pytest.approx(rewards.mean())
    assert means[-1] == pytest.approx(rewards.max(1).mean())


def test_a_swapped_pair_takes_its_cut_off_marks_along():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_cut_off": True, "rejected_cut_off": False}
    assert swapped(row) == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "a",
        "chosen_cut_off": False,
        "rejected_cut_off": True,
    }
    assert swapped(swapped(row)) == row


def test_half_of_the_labels_are_exchanged_at_every_margin():
    margins = np.random.default_rng(1).random(200).tolist()
    taken = half_of(margins, np.random.default_rng(2))
    assert taken.sum() == 100
    assert all(taken[np.argsort(margins)].reshape(-1, 2).sum(1) == 1)
    assert abs(np.where(taken, -1, 1) @ margins) < 1
    assert (taken != half_of(margins, np.random.default_rng(3))).any()
