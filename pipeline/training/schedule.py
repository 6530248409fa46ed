"""What happens at which step: the order of the pairs and the learning rate, as pure functions of the step.

Nothing here has state (the last order is kept because it is asked for again), so resuming needs the step's number and nothing
else, and scoring beforehand cannot disturb the order of training.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from pipeline.config.training import TrainConfig

# by default checkpoints are so many steps apart, and so many times as long as writing one takes
SAVE_STEPS, _TIMES_ITS_WRITING = 50, 20


def total_steps(pairs: int, train: TrainConfig) -> int:
    """Optimizer steps of the whole training; the last one may hold fewer pairs."""
    if train.max_steps > 0:
        return train.max_steps
    return math.ceil(pairs * train.num_train_epochs / pairs_per_step(train))


def pairs_per_step(train: TrainConfig) -> int:
    """Pairs whose mean loss makes one optimizer step."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def is_due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `done` of them."""
    return every > 0 and done % every == 0


def checkpoint_is_due(done: int, every: int | None, idle: float, writing: float) -> bool:
    """Whether to write a checkpoint after `done` steps: every `every`; None: every 50, if writing the last one (`writing` seconds)
    took at most a twentieth of the `idle` seconds since.
    """
    if every is not None:
        return is_due(done, every)
    return is_due(done, SAVE_STEPS) and idle >= _TIMES_ITS_WRITING * writing


def pairs_of_step(step: int, pairs: int, train: TrainConfig) -> list[int]:
    """Positions of the pairs of optimizer step `step` (from 0): every epoch is a permutation drawn from seed and epoch."""
    size = pairs_per_step(train)
    last = pairs * math.ceil(train.num_train_epochs) if train.max_steps <= 0 else (step + 1) * size
    if train.max_steps <= 0:
        last = min(last, math.ceil(pairs * train.num_train_epochs))
    rows: list[int] = []
    for place in range(step * size, min((step + 1) * size, last)):
        epoch, offset = divmod(place, pairs)
        rows.append(int(_epoch_order(train.seed, epoch, pairs)[offset]))
    return rows


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up that never is 0, then linear, cosine or constant."""
    warmup = round(train.warmup_ratio * steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * (1 - done)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return train.learning_rate


@lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, pairs: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(pairs)
