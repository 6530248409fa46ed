"""The preference objective on data that is no pairs: responses labelled good or bad, and ranked lists of any length.

Shapes: B responses of a pass, or G lists of N responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.config.training import TrainConfig
from pipeline.forward.logps import Forward
from pipeline.forward.transfer import to_device
from pipeline.training.inputs.responses import Responses
from pipeline.training.objectives.common import AtOnce, CausalPolicy
from pipeline.training.objectives.losses import LossTerms
from pipeline.training.objectives.measured import Found, Measured, mean_over, measured_pairs
from pipeline.training.objectives.ranked import best_and_worst, plackett_luce_loss
from pipeline.training.objectives.unpaired import ResponseTerms, bco_loss, kl_baseline, kto_loss, measured_responses
from pipeline.training.parallel.plan import passes
from pipeline.training.parallel.world import World


class Baselines(NamedTuple):
    """What the responses of a step are compared with, float64 scalars: KTO's z0 in nats, and BCO's mean reward."""

    z0: torch.Tensor
    delta: torch.Tensor


class OfResponses(CausalPolicy):
    """A step is made of labelled responses, or of lists."""

    in_words = "with preference optimization"

    def whole(self, examples: Responses, rows: Sequence[int], train: TrainConfig) -> None:
        """See `Objective.whole`: nothing."""

    def parts(self, examples: Responses, rows: Sequence[int]) -> tuple[Responses, Sequence[int]]:
        """See `Objective.parts`: the examples themselves."""
        return examples, rows


class Labelled(OfResponses):
    """See `pipeline.training.objectives.objective.Objective`; every example is one response."""

    unit = "response"

    def before(
        self,
        forward: Forward,
        examples: Responses,
        rows: Sequence[int],
        train: TrainConfig,
        whole: None,  # noqa: ARG002  # the protocol's
        world: World,
        *,
        learning: bool,
    ) -> Baselines:
        """See `Objective.before`: what all responses of the step make together is there before the first one's loss.

        KTO's is measured on the mismatched responses, which learn nothing; BCO's, the mean of all rewards so far, on this step's.
        An evaluation adds nothing to it.
        """
        z0, delta = torch.zeros(2, dtype=torch.float64)
        if "kto" in train.loss_type and examples.mismatched is not None:
            z0 = kl_baseline(*_summed_ratios(forward, examples.mismatched, rows, train, world))
        if "bco" in train.loss_type:
            if learning:
                total, count = _summed_ratios(forward, examples, rows, train, world)
                examples.running.add(train.beta * float(total), float(count))
            delta = delta + examples.running.mean
        return Baselines(z0, delta)

    def measured(
        self, forward: Forward, examples: Responses, group: Sequence[int], train: TrainConfig, whole: Baselines
    ) -> Found:
        """See `Objective.measured`."""
        policy_B, reference_B = _sums(forward, examples, group)
        good_B = to_device(examples.good[[examples.starts[row] for row in group]], policy_B.device)
        z0, delta = (value.to(policy_B.device) for value in whole)
        weights = {
            "desirable_weight": train.desirable_weight,
            "undesirable_weight": train.undesirable_weight,
            "beta": train.beta,
        }
        terms: list[ResponseTerms] = []
        for name in train.loss_type:
            loss, baseline = (kto_loss, z0) if name == "kto" else (bco_loss, delta)
            terms.append(loss(policy_B, reference_B, good_B, baseline, **weights))
        of_losses = train.loss_weights or [1.0] * len(terms)
        losses = torch.stack([weight * one.losses for weight, one in zip(of_losses, terms, strict=True)]).sum(dim=0)
        found = measured_responses(terms[0]._replace(losses=losses), policy_B, good_B)
        kl = {"kl": mean_over(z0.expand(len(group)))} if "kto" in train.loss_type else {}
        return Found(losses, Measured({**found.means, **kl}))


class Lists(AtOnce, OfResponses):
    """See `pipeline.training.objectives.objective.Objective`; every example is a prompt's list, best first."""

    unit = "list"

    def measured(
        self,
        forward: Forward,
        examples: Responses,
        group: Sequence[int],
        train: TrainConfig,
        whole: None,  # noqa: ARG002
    ) -> Found:
        """See `Objective.measured`."""
        policy_N, reference_N = _sums(forward, examples, group)
        numbers = [number for row in group for number in examples.of(row)]
        sizes = [len(examples.of(row)) for row in group]
        scores_N = to_device(examples.scores[numbers], policy_N.device)
        rho_N = policy_N - reference_N
        losses_G = plackett_luce_loss(rho_N, scores_N, sizes, beta=train.beta)
        rewards_2G = best_and_worst(train.beta * rho_N.detach(), sizes).float()
        sums_2G = best_and_worst(policy_N.detach(), sizes)
        found = measured_pairs(LossTerms(losses_G, rewards_2G[0], rewards_2G[1]), sums_2G)
        return Found(losses_G, found)


def _sums(forward: Forward, examples: Responses, group: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sums of the policy's and the reference's logps of the responses of `group`, one after the other."""
    branches = [logps for tree in forward([examples.trees[row] for row in group]) for logps in tree]
    policy = torch.stack([logps.double().sum() for logps in branches])
    numbers = [number for row in group for number in examples.of(row)]
    return policy, to_device(examples.ref_sums[numbers], policy.device)


@torch.no_grad()
def _summed_ratios(
    forward: Forward, examples: Responses, rows: Sequence[int], train: TrainConfig, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of log(policy / reference) of the responses of `rows` in all processes, and how many they are."""
    parts = []
    # forked, so that dropout of adapters falls as if nothing had been read before
    with torch.random.fork_rng():
        for group, counts in passes(forward, examples, rows, train, world):
            policy, reference = _sums(forward, examples, group)
            gaps = (policy - reference) * float(counts)
            parts.append(torch.stack([gaps.sum(), torch.full_like(gaps, float(counts)).sum()]))
    total, count = world.total(torch.stack(parts).sum(dim=0))
    return total, count
