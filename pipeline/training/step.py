"""One step of training, and an evaluation: losses, their gradients, and the means of what an objective measures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.losses import across_pairs
from pipeline.config.training import TrainConfig
from pipeline.errors import CheckError, first_line
from pipeline.forward.logps import Forward
from pipeline.hardware import device_kind
from pipeline.training.inputs.batches import Examples, micro_batches
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.objectives.losses import PairLogps, preference_loss
from pipeline.training.objectives.measured import Measured, mean_chosen_tokens, measured_pairs
from pipeline.training.objectives.objective import PREFERENCE, REWARD, objective_of
from pipeline.training.objectives.preference import joined, pair_logps
from pipeline.training.optimizers import MUST_BE_FINITE, numbers
from pipeline.training.parallel.plan import Pass, counted, passes, places_of
from pipeline.training.parallel.world import ALONE, World

# is told rows, and the policy's sums of their chosen and rejected responses, [2, rows]: on the device, which was not waited for
Note = Callable[[Sequence[int], torch.Tensor], None]


class NotFinite(CheckError):
    """A loss or a gradient that is not finite, with the pairs, or other examples, of its step."""

    def __init__(self, what: str, value: float, pair_ids: list[str], unit: str = "pair", *, taken: bool) -> None:
        outcome = (
            "the step was taken inside the backward pass, so the weights in memory are spoiled and not saved. The same command "
            "goes on after the last checkpoint. Lower train.learning_rate, or set train.optimizer_in_backward=false"
            if taken
            else "training stops before it spoils the weights. Lower train.learning_rate or train.max_grad_norm"
        )
        super().__init__(f"the {what} is {value}: {outcome}; the {unit}s of the step are {', '.join(pair_ids)}")
        self.pair_ids, self.unit = pair_ids, unit


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


def train_step(forward: Any, examples: Examples, rows: Sequence[int], train: TrainConfig) -> dict[str, float]:
    """`accumulate`, its means as numbers. Raises NotFinite, and CheckError as it does."""
    values = numbers(accumulate(forward, examples, rows, train))
    must_be_finite(values, examples, rows, train)
    return values


@_no_gradient_lost()
def accumulate(
    forward: Any,
    examples: Examples,
    rows: Sequence[int],
    train: TrainConfig,
    note: Note | None = None,
    world: World = ALONE,
) -> dict[str, torch.Tensor]:
    """Accumulate the gradient of the mean loss over `rows`; returns means of what the objective measures, scalars on the device.

    The mean is over the examples of the whole step, so splitting a step into more forward passes, or over the processes of `world`,
    changes nothing. Losses that sort pairs see the whole step too: then every forward pass but a single one runs twice. Nothing
    here waits for the device. `note` is told the log-probabilities of all pairs at once, if the objective has any.
    Raises CheckError if an operation of the model has no gradient.
    """
    objective = objective_of(train)
    whole = objective.whole(examples, rows, train)
    examples, rows = objective.parts(examples, rows)
    made = passes(forward, examples, rows, train, world)
    if across_pairs(train) and (len(made) > 1 or not world.alone):
        return _step_in_two_passes(forward, examples, rows, made, train, note, world)
    whole = objective.before(forward, examples, rows, train, whole, world, learning=True)
    measured: list[tuple[Measured, bool]] = []
    policy: list[torch.Tensor] = []
    for group, counts in made:
        found = objective.measured(forward, examples, group, train, whole)
        measured.append((found.measured, counts))
        policy += [found.sums_2B.detach()] if counts and found.sums_2B is not None else []
        loss = found.losses.sum() / len(rows)
        torch.autograd.backward(loss if counts else loss * 0.0)
    _tell(note, rows, made, policy, world)
    return _means(measured, world)


def must_be_finite(values: Mapping[str, float], examples: Examples, rows: Sequence[int], train: TrainConfig) -> None:
    """Raise NotFinite, with the examples of `rows`, if the loss or the gradient's norm of their step is not finite."""
    for name, value in values.items():
        if name in MUST_BE_FINITE and not math.isfinite(value):
            ids = [examples.ids[row] for row in rows]
            unit = objective_of(train).unit
            raise NotFinite(MUST_BE_FINITE[name], value, ids, unit, taken=train.optimizer_in_backward)


@torch.no_grad()
def evaluate(
    forward: Any, examples: Examples, train: TrainConfig, note: Note | None = None, world: World = ALONE
) -> dict[str, float]:
    """Means over all `examples`; losses that sort pairs sort all of them. `note` and `world` as of `accumulate`."""
    objective = objective_of(train)
    whole = objective.whole(examples, range(len(examples)), train)
    examples, rows = objective.parts(examples, range(len(examples)))
    made = passes(forward, examples, rows, train, world, train.per_device_eval_batch_size)
    if across_pairs(train):
        step = _whole_step(forward, examples, rows, made, train, whole, world)
        if note is not None:
            note(*step.noted)
        return numbers(_means([(measured_pairs(preference_loss(step.logps, train), step.logps.sums_2B), True)], ALONE))
    whole = objective.before(forward, examples, rows, train, whole, world, learning=False)
    measured, policy = list[tuple[Measured, bool]](), list[torch.Tensor]()
    for group, counts in made:
        found = objective.measured(forward, examples, group, train, whole)
        measured.append((found.measured, counts))
        policy += [found.sums_2B.detach()] if counts and found.sums_2B is not None else []
    _tell(note, rows, made, policy, world)
    return numbers(_means(measured, world))


@torch.no_grad()
def pair_rewards(forward: Any, pairs: Pairs, train: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of chosen and rejected, float64 [pairs], in the order of `pairs`."""
    rows = range(len(pairs))
    rewards = np.zeros((2, len(pairs)))
    mean_tokens = mean_chosen_tokens(pairs, rows)
    objective = REWARD if train.objective == "reward" else PREFERENCE
    for group in micro_batches(forward, pairs, rows, train, train.per_device_eval_batch_size):
        terms = objective.terms(forward, pairs, group, train, mean_tokens)[0]
        rewards[0, group] = terms.chosen_rewards.cpu().numpy()
        rewards[1, group] = terms.rejected_rewards.cpu().numpy()
    return rewards[0], rewards[1]


class _Whole(NamedTuple):
    """What is known of all pairs of a step; `places`: for each pass, where its pairs stand; `noted`: what `note` is told."""

    logps: PairLogps
    places: list[list[int]]
    noted: tuple[Sequence[int], torch.Tensor]


@torch.no_grad()
def _whole_step(
    forward: Forward,
    pairs: Any,
    rows: Sequence[int],
    made: Sequence[Pass],
    train: TrainConfig,
    mean_tokens: float,
    world: World,
) -> _Whole:
    """Every pair's logps without gradient, in every process those of all."""
    # forked, so that dropout of adapters falls alike in both passes
    with torch.random.fork_rng():
        parts = [(pair_logps(forward, pairs, group, train, mean_tokens), counts) for group, counts in made]
    mine = list(counted(made))
    own = joined([part for part, counts in parts if counts]) if mine else None
    if world.alone and own is not None:
        return _Whole(own, places_of(mine, made), (mine, own.sums_2B.detach()))
    places = places_of(rows, made)
    table = torch.zeros(10, len(rows), dtype=torch.float64, device=parts[0][0].sums_2B.device)
    if own is not None:
        here = [place for of_pass, (_, counts) in zip(places, made, strict=True) if counts for place in of_pass]
        margins = torch.zeros_like(own.weights_B) if own.margins_B is None else own.margins_B
        table[:, here] = torch.cat([*own[:4], own.weights_B[None], margins[None]]).double()
    table = world.total(table)
    logps = PairLogps(table[0:2], table[2:4], table[4:6], table[6:8], table[8], mean_tokens, table[9])
    return _Whole(logps, places, (list(rows), logps.sums_2B.clone()))


def _step_in_two_passes(
    forward: Forward,
    pairs: Any,
    rows: Sequence[int],
    made: Sequence[Pass],
    train: TrainConfig,
    note: Note | None,
    world: World,
) -> dict[str, torch.Tensor]:
    """First every pair's logps without gradient, then the loss's derivative by each of them, then the layers'."""
    mean_tokens = mean_chosen_tokens(pairs, [*counted(made)] if world.alone else rows)
    whole = _whole_step(forward, pairs, rows, made, train, mean_tokens, world)
    if note is not None:
        note(*whole.noted)
    leaves = [values.clone().requires_grad_() for values in (whole.logps.policy_2B, whole.logps.sums_2B)]
    seen = whole.logps._replace(policy_2B=leaves[0], sums_2B=leaves[1])
    terms = preference_loss(seen, train)
    measured = measured_pairs(terms, seen.sums_2B)
    gradients = torch.autograd.grad(terms.losses.mean(), leaves, materialize_grads=True)
    for (group, counts), places in zip(made, whole.places, strict=True):
        part = pair_logps(forward, pairs, group, train, mean_tokens)
        of_part = [gradient[:, places] * float(counts) for gradient in gradients]
        torch.autograd.backward([part.policy_2B, part.sums_2B], of_part)
    return _means([(measured, True)], ALONE)


def _tell(
    note: Note | None, rows: Sequence[int], made: Sequence[Pass], policy: Sequence[torch.Tensor], world: World
) -> None:
    """Tell `note` the sums of the pairs that every process has read, in one tensor."""
    if world.alone:
        if note is not None and policy:
            note(list(counted(made)), torch.cat(list(policy), dim=1))
        return
    # every process must send, be it nothing; a reward model has no sums, in none of them
    told = world.total(torch.tensor(float(bool(policy)), device=_device_of(policy))) > 0
    if not told:
        return
    table = torch.zeros(2, len(rows), dtype=torch.float64, device=_device_of(policy))
    if policy:
        places = zip(places_of(rows, made), made, strict=True)
        here = [place for of_pass, (_, counts) in places if counts for place in of_pass]
        table[:, here] = torch.cat(list(policy), dim=1).double()
    table = world.total(table)
    if note is not None:
        note(list(rows), table)


def _device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device(device_kind())


def _means(parts: Sequence[tuple[Measured, bool]], world: World) -> dict[str, torch.Tensor]:
    """What the passes that count measured, over all processes: sums by their counts, NaN if nothing was there; and maxima."""
    first = parts[0][0]
    sums, counts = (
        torch.stack(
            [
                torch.stack([part.means[name][side] * float(counts) for part, counts in parts]).sum()
                for name in first.means
            ]
        )
        for side in (0, 1)
    )
    total = world.total(torch.stack([sums, counts]))
    means = dict(zip(first.means, total[0] / total[1], strict=True))
    if "rewards/chosen" in means and "rewards/margins" not in means:
        # of responses that are no pairs: a difference of means, which no part of a step knows
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    if not first.highest:
        return means
    # what does not count has read another's examples, whose maxima are theirs
    own = torch.stack([torch.stack([part.highest[name] for part, _ in parts]).max() for name in first.highest])
    return means | dict(zip(first.highest, torch.stack(world.gathered(own)).amax(dim=0), strict=True))
