"""One step of training, and an evaluation: losses, their gradients, their means under the names of TRAIN_METRICS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pipeline.config.losses import across_pairs
from pipeline.config.training import TrainConfig
from pipeline.errors import CheckError, first_line
from pipeline.forward.logps import Forward
from pipeline.training.examples import Pairs, micro_batches
from pipeline.training.objectives.losses import LossTerms, PairLogps, preference_loss
from pipeline.training.objectives.objective import objective_of
from pipeline.training.objectives.preference import joined, pair_logps
from pipeline.training.optimizers import numbers

# is told rows, and the policy's sums of their chosen and rejected responses, [2, rows]: on the device, which was not waited for
Note = Callable[[Sequence[int], torch.Tensor], None]

# what a step must not have, as its message calls it
_MUST_BE_FINITE = {"loss": "loss", "grad_norm": "gradient norm"}


class NotFinite(CheckError):
    """A loss or a gradient that is not finite, with the pairs of its step."""

    def __init__(self, what: str, value: float, pair_ids: list[str], *, taken: bool) -> None:
        outcome = (
            "the step was taken inside the backward pass, so the weights in memory are spoiled and not saved. The same command "
            "goes on after the last checkpoint. Lower train.learning_rate, or set train.optimizer_in_backward=false"
            if taken
            else "training stops before it spoils the weights. Lower train.learning_rate or train.max_grad_norm"
        )
        super().__init__(f"the {what} is {value}: {outcome}; the pairs of the step are {', '.join(pair_ids)}")
        self.pair_ids = pair_ids


@contextmanager
def _no_gradient_lost() -> Iterator[None]:
    """Raise CheckError if a gradient ends at an operation that has none, of which torch only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        try:
            yield
        except UserWarning as warning:
            raise CheckError(
                f"the policy cannot be trained so, as gradients do not pass one of its operations: {first_line(warning)}"
            ) from None


def train_step(forward: Any, pairs: Pairs, rows: Sequence[int], train: TrainConfig) -> dict[str, float]:
    """`accumulate`, its means as numbers. Raises NotFinite, and CheckError as it does."""
    values = numbers(accumulate(forward, pairs, rows, train))
    must_be_finite(values, pairs, rows, train)
    return values


@_no_gradient_lost()
def accumulate(
    forward: Any, pairs: Pairs, rows: Sequence[int], train: TrainConfig, note: Note | None = None
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of the mean loss over `rows`; returns means of TRAIN_METRICS, scalars on the device.

    The mean is over the pairs of the whole step, so splitting a step into more forward passes changes nothing. Losses that
    sort pairs see the whole step too: then every forward pass but a single one runs twice. Nothing here waits for the device.
    `note` is told the log-probabilities of all pairs at once, if the objective has any.
    Raises CheckError if an operation of the model has no gradient.
    """
    groups = list(micro_batches(forward, pairs, rows, train))
    if across_pairs(train) and len(groups) > 1:
        return _step_in_two_passes(forward, pairs, groups, train, note)
    mean_tokens = _mean_chosen_tokens(pairs, rows)
    sums: list[dict[str, torch.Tensor]] = []
    policy: list[torch.Tensor] = []
    for group in groups:
        terms, logps = objective_of(train).terms(forward, pairs, group, train, mean_tokens)
        sums.append(_sums(terms, logps))
        policy += _policy_sums(logps)
        torch.autograd.backward(terms.losses.sum() / len(rows))
    _tell(note, groups, policy)
    return _means(sums, len(rows))


def must_be_finite(values: Mapping[str, float], pairs: Pairs, rows: Sequence[int], train: TrainConfig) -> None:
    """Raise NotFinite, with the pairs of `rows`, if the loss or the gradient's norm of their step is not finite."""
    for name, value in values.items():
        if name in _MUST_BE_FINITE and not math.isfinite(value):
            pair_ids = [pairs.pair_ids[row] for row in rows]
            raise NotFinite(_MUST_BE_FINITE[name], value, pair_ids, taken=train.optimizer_in_backward)


@torch.no_grad()
def evaluate(forward: Any, pairs: Pairs, train: TrainConfig, note: Note | None = None) -> dict[str, float]:
    """Means of TRAIN_METRICS over all `pairs`; losses that sort pairs sort all of them. `note` as of `accumulate`."""
    rows = range(len(pairs))
    groups = list(micro_batches(forward, pairs, rows, train, train.per_device_eval_batch_size))
    mean_tokens = _mean_chosen_tokens(pairs, rows)
    if not across_pairs(train):
        sums, policy = list[dict[str, torch.Tensor]](), list[torch.Tensor]()
        for group in groups:
            terms, logps = objective_of(train).terms(forward, pairs, group, train, mean_tokens)
            sums.append(_sums(terms, logps))
            policy += _policy_sums(logps)
        _tell(note, groups, policy)
        return numbers(_means(sums, len(pairs)))
    whole = joined([pair_logps(forward, pairs, group, train, mean_tokens) for group in groups])
    _tell(note, groups, _policy_sums(whole))
    return numbers(_means([_sums(preference_loss(whole, train), whole)], len(pairs)))


@torch.no_grad()
def pair_rewards(forward: Any, pairs: Pairs, train: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of chosen and rejected, float64 [pairs], in the order of `pairs`."""
    rows = range(len(pairs))
    rewards = np.zeros((2, len(pairs)))
    mean_tokens = _mean_chosen_tokens(pairs, rows)
    for group in micro_batches(forward, pairs, rows, train, train.per_device_eval_batch_size):
        terms = objective_of(train).terms(forward, pairs, group, train, mean_tokens)[0]
        rewards[0, group] = terms.chosen_rewards.cpu().numpy()
        rewards[1, group] = terms.rejected_rewards.cpu().numpy()
    return rewards[0], rewards[1]


def _mean_chosen_tokens(pairs: Pairs, rows: Sequence[int]) -> float:
    return float(np.mean([len(pairs.trees[row].branches[0]) for row in rows]))


def _step_in_two_passes(
    forward: Forward, pairs: Pairs, groups: list[list[int]], train: TrainConfig, note: Note | None
) -> dict[str, torch.Tensor]:
    """First every pair's logps without gradient, then the loss's derivative by each of them, then the layers'."""
    rows = [row for group in groups for row in group]
    # forked, so that dropout of adapters falls alike in both passes
    mean_tokens = _mean_chosen_tokens(pairs, rows)
    with torch.no_grad(), torch.random.fork_rng():
        whole = joined([pair_logps(forward, pairs, group, train, mean_tokens) for group in groups])
    _tell(note, groups, _policy_sums(whole))
    leaves = [values.requires_grad_() for values in (whole.policy_2B, whole.sums_2B)]
    terms = preference_loss(whole, train)
    sums = _sums(terms, whole)
    gradients = torch.autograd.grad(terms.losses.mean(), leaves, materialize_grads=True)
    start = 0
    for group in groups:
        part, stop = pair_logps(forward, pairs, group, train, mean_tokens), start + len(group)
        torch.autograd.backward([part.policy_2B, part.sums_2B], [gradient[:, start:stop] for gradient in gradients])
        start = stop
    return _means([sums], len(rows))


def _policy_sums(logps: PairLogps | None) -> list[torch.Tensor]:
    """What `_tell` takes of some pairs, without their gradients; nothing of a reward model."""
    return [] if logps is None else [logps.sums_2B.detach()]


def _tell(note: Note | None, groups: Sequence[Sequence[int]], policy: Sequence[torch.Tensor]) -> None:
    """Tell `note` the sums of the pairs of `groups`, in one tensor."""
    if note is not None and policy:
        note([row for group in groups for row in group], torch.cat(list(policy), dim=1))


def _sums(terms: LossTerms, logps: PairLogps | None) -> dict[str, torch.Tensor]:
    """Sums over the pairs, under the names of TRAIN_METRICS; a reward model has no logps."""
    margins = terms.chosen_rewards - terms.rejected_rewards
    values = {
        "loss": terms.losses,
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }
    if logps is not None:
        values |= {"logps/chosen": logps.sums_2B[0], "logps/rejected": logps.sums_2B[1]}
    return {name: value.detach().sum().double() for name, value in values.items()}


def _means(metrics: list[dict[str, torch.Tensor]], pairs: int) -> dict[str, torch.Tensor]:
    return {name: torch.stack([part[name] for part in metrics]).sum() / pairs for name in metrics[0]}
