"""Trainings that go wrong are named in words, healthy ones are left alone."""

import math

import pytest

from pipeline.config.training import TrainConfig
from pipeline.training.checks.health import findings, length_words

TRAIN = TrainConfig()


def rows(number=40, **columns):
    """Metrics of a healthy training; each column may be a function of the share that is done."""
    healthy = {
        "loss": lambda done: math.log(2) - 0.3 * done,
        "rewards/margins": lambda done: done,
        "rewards/accuracies": lambda done: 0.5 + 0.3 * done,
        "rewards/chosen": lambda done: 0.2 * done,
        "grad_norm": lambda done: 2.0,
        "eval_loss": lambda done: math.log(2) - 0.25 * done,
        "eval_rewards/accuracies": lambda done: 0.5 + 0.2 * done,
    } | {name.replace("__", "/"): value for name, value in columns.items()}
    found = []
    for step in range(number):
        row = {name: value(step / number) for name, value in healthy.items()}
        found.append(row if step % 10 == 0 else {name: value for name, value in row.items() if "eval" not in name})
    return found


def test_a_healthy_run_is_left_alone():
    assert findings(rows(), TRAIN, 40) == []
    assert findings([], TRAIN, 40) == []


@pytest.mark.parametrize(
    ("columns", "kind", "said"),
    [
        ({"loss": lambda _: math.log(2) - 1e-4, "rewards__margins": lambda _: 2e-4}, "stuck", "stays at ln 2"),
        ({"eval_rewards__accuracies": lambda _: 0.4}, "below chance", "held-out reward accuracy is 0.40, below chance"),
        ({"rewards__chosen": lambda done: -4 * done}, "displaced", "less likely too"),
        ({"grad_norm": lambda done: 500 * done}, "gradient norms", "Gradient norms reach"),
        ({"eval_loss": lambda done: 0.69 - 0.4 * done + done**2}, "overfitted", "learns the pairs by heart"),
    ],
)
def test_each_fault_is_named_alone(columns, kind, said):
    (finding,) = findings(rows(**columns), TRAIN, 40)
    assert (finding.kind, said in finding.sentence) == (kind, True)


def test_without_held_out_pairs_the_training_accuracy_counts():
    plain = [
        {name: value for name, value in row.items() if "eval" not in name}
        for row in rows(rewards__accuracies=lambda _: 0.3)
    ]
    (finding,) = findings(plain, TRAIN, 40)
    assert "training reward accuracy is 0.30" in finding.sentence


def test_nothing_is_said_too_early():
    wrong = rows(7, eval_rewards__accuracies=lambda _: 0.1)
    assert findings(wrong, TRAIN, 7) == []
    assert findings(rows(9, grad_norm=lambda _: 1e4), TRAIN, 400) == []


def test_ln_2_means_nothing_to_other_losses():
    stuck = rows(loss=lambda _: math.log(2), rewards__margins=lambda _: 0.0)
    assert findings(stuck, TrainConfig(loss_type="ipo"), 40) == []


def test_what_is_no_pair_is_not_told_of_pairs():
    labelled = TrainConfig(loss_type="kto")
    (finding,) = findings(rows(eval_rewards__accuracies=lambda _: 0.4), labelled, 40)
    assert "Of the held-out responses 0.40 lie on their label's side" in finding.sentence
    for train in (labelled, TrainConfig(loss_type="plackett_luce")):
        (finding,) = findings(rows(rewards__chosen=lambda done: -4 * done), train, 40)
        assert "a higher train.beta, or fewer steps hold it" in finding.sentence
    (finding,) = findings(rows(rewards__chosen=lambda done: -4 * done), TRAIN, 40)
    assert "an sft term" in finding.sentence


def test_lengths_that_explode_are_named_with_the_falling_reward():
    falling = rows(rewards__chosen=lambda done: -2 * done)
    (sentence,) = length_words(falling, 300.0, 100.0)
    assert "3.0 times as long" in sentence
    assert "less likely" in sentence
    assert length_words(falling, 150.0, 100.0) == []
