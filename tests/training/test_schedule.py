"""Order of pairs and learning rate, as functions of the step."""

import pytest

from pipeline.config.training import TrainConfig
from pipeline.training.schedule import checkpoint_is_due, learning_rate, pairs_of_step, total_steps


def test_an_epoch_sees_every_pair_once_and_the_last_step_may_be_short():
    train = TrainConfig(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    steps = total_steps(20, train)
    seen = [pairs_of_step(step, 20, train) for step in range(steps)]
    assert [len(rows) for rows in seen] == [6, 6, 6, 2]
    assert sorted(row for rows in seen for row in rows) == list(range(20))


def test_epochs_differ_and_the_seed_decides_them():
    train = TrainConfig(per_device_train_batch_size=10, gradient_accumulation_steps=1, num_train_epochs=2, seed=3)
    first, second = pairs_of_step(0, 10, train), pairs_of_step(1, 10, train)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first == pairs_of_step(0, 10, train)
    assert first != pairs_of_step(0, 10, train.model_copy(update={"seed": 4}))


def test_max_steps_goes_on_into_further_epochs():
    train = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=7)
    rows = [row for step in range(total_steps(10, train)) for row in pairs_of_step(step, 10, train)]
    assert len(rows) == 28
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))


@pytest.mark.parametrize(("epochs", "expected"), [(1, [4, 4, 2]), (2, [4] * 5), (1.5, [4, 4, 4, 3]), (0.5, [4, 1])])
def test_epochs_whole_and_broken_by_hand(epochs, expected):
    train = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=1, num_train_epochs=epochs)
    assert total_steps(10, train) == len(expected)
    # the step after the last has no pairs
    assert [len(pairs_of_step(step, 10, train)) for step in range(len(expected) + 1)] == [*expected, 0]


@pytest.mark.parametrize(
    ("done", "every", "idle", "writing", "due"),
    [
        (50, None, 0.0, 0.0, True),
        (49, None, 1e9, 0.0, False),
        (50, None, 100.0, 6.0, False),
        (100, None, 120.0, 6.0, True),
        (6, 3, 0.0, 1e9, True),
        (50, 0, 1e9, 0.0, False),
        (50, 60, 1e9, 0.0, False),
    ],
)
def test_checkpoints_are_rarer_if_they_take_long_unless_they_are_asked_for(done, every, idle, writing, due):
    assert checkpoint_is_due(done, every, idle, writing) == due


def test_one_step_is_a_number_of_steps_like_any_other():
    train = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=1, num_train_epochs=2, max_steps=1)
    assert total_steps(10, train) == 1
    # a step of a training by steps is whole, whatever the epochs say
    assert len(pairs_of_step(9, 10, train)) == 4


def test_a_rate_falls_over_a_single_step_after_the_warm_up():
    train = TrainConfig(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="linear")
    assert [learning_rate(step, 2, train) for step in range(3)] == [1.0, 1.0, 0.0]


def test_the_split_into_micro_batches_does_not_change_a_step():
    one = TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    many = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert pairs_of_step(1, 40, one) == pairs_of_step(1, 40, many)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5] + [1.0] * 9),
        ("cosine", [0.5, 1.0, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    ],
)
def test_learning_rates_by_hand(kind, expected):
    train = TrainConfig(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type=kind)
    assert [learning_rate(step, 10, train) for step in range(10)] == pytest.approx(expected, abs=1e-4)


def test_no_number_of_steps_means_the_epochs_however_it_is_written():
    by_epochs, zero = TrainConfig(num_train_epochs=1.5), TrainConfig(num_train_epochs=1.5, max_steps=0)
    assert total_steps(9, zero) == total_steps(9, by_epochs) > 0
    assert [pairs_of_step(step, 9, zero) for step in range(9)] == [
        pairs_of_step(step, 9, by_epochs) for step in range(9)
    ]
