"""Where losses of labelled responses, of lists and of margins lead, on a problem where every response can be enumerated.

Their exact expectations are minimised in float64 over the policy's logits; the losses are those of training.
"""

import itertools
import math

import pytest
import torch

from pipeline.training.objectives.ranked import plackett_luce_loss, rpo_bwd_kl_loss, rpo_fwd_kl_loss, rpo_sq_loss
from pipeline.training.objectives.unpaired import bco_loss, kto_loss
from tests.theory.test_dpo import BETA, RESPONSES, distribution, optimum


def known_problem(seed=11):
    """Reference log-probabilities, and rewards of every response, whose mean is 0."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
    return distribution(generator), rewards - rewards.mean()


def trained(start, expected_loss, steps=500):
    """Log-probabilities that minimise `expected_loss`, from `start`."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def total_variation(first, second):
    return float(0.5 * (first.exp() - second.exp()).abs().sum())


# --- lists


def test_plackett_luce_reaches_the_optimum_of_the_objective():
    """Lists of three, each order as likely as Plackett and Luce say: the minimiser is pi_ref exp(r / beta) / Z, as DPO's."""
    reference, rewards = known_problem()
    # every fourth response: 10 of them, each list of three, each order
    places = torch.arange(0, len(RESPONSES), 4)
    lists = torch.tensor(list(itertools.permutations(range(len(places)), 3)))
    reference, rewards = reference[places].log_softmax(0), rewards[places]
    drawn = rewards[lists]
    chance = torch.exp(drawn.sum(1) - drawn.logsumexp(1) - drawn[:, 1:].logsumexp(1) - drawn[:, 2:].logsumexp(1))
    scores = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).repeat(len(lists))

    def expected(policy):
        rho = (policy - reference)[lists].flatten()
        return (chance * plackett_luce_loss(rho, scores, [3] * len(lists), beta=BETA)).sum() / chance.sum()

    best = optimum(reference, rewards)
    assert total_variation(reference, best) > 0.2
    assert total_variation(trained(reference, expected), best) < 1e-2


# --- margins


@pytest.mark.parametrize("loss", [rpo_sq_loss, rpo_bwd_kl_loss, rpo_fwd_kl_loss])
def test_reward_aware_losses_reach_the_optimum_of_the_objective(loss):
    """Scores that are rewards in other units: with eta their unit, the minimiser is pi_ref exp(r / beta) / Z; from no preferences."""
    reference, rewards = known_problem()
    eta = 0.25
    scores = rewards / eta + 3
    w, lost = torch.tensor(list(itertools.combinations(range(len(RESPONSES)), 2))).T

    def expected(policy, eta=eta):
        rho = policy - reference
        return loss(rho[w], rho[lost], scores[w] - scores[lost], beta=BETA, eta=eta).mean()

    best = optimum(reference, rewards)
    found = trained(reference, expected)
    assert total_variation(reference, best) > 0.2
    assert total_variation(found, best) < 1e-2
    # another unit is another temperature
    half = trained(reference, lambda policy: expected(policy, eta / 2))
    assert total_variation(half, optimum(reference, rewards / 2)) < 1e-2


# --- labels


def expected_of_labels(loss, policy, reference, baseline, good_share, weights=(1.0, 1.0)):
    """The mean over all responses, each labelled good with its `good_share`."""
    given = {"beta": BETA, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    good = loss(policy, reference, torch.ones_like(policy, dtype=torch.bool), baseline, **given).losses
    bad = loss(policy, reference, torch.zeros_like(policy, dtype=torch.bool), baseline, **given).losses
    return (good_share * good + (1 - good_share) * bad).mean()


def descended(reference, good_share, weights=(1.0, 1.0), steps=400):
    """The policy that KTO's expected update leads to, with the exact divergence as its baseline."""
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        policy = logits.log_softmax(0)
        z0 = (policy.exp() * (policy - reference)).sum().detach()
        optimizer.zero_grad()
        expected_of_labels(kto_loss, policy, reference, z0, good_share, weights).backward()
        optimizer.step()
    return logits.detach().log_softmax(0)


def test_ktos_slope_has_the_sign_of_the_majority_whatever_the_policy():
    """No reward of a response is a stationary point, but where its labels balance: then all are."""
    reference, rewards = known_problem()
    share = torch.sigmoid(rewards).clone()
    share[0] = 0.5
    generator = torch.Generator().manual_seed(2)
    for z0 in (0.0, 0.4, 5.0):
        policy = distribution(generator).requires_grad_()
        baseline = torch.tensor(z0, dtype=torch.float64)
        expected_of_labels(kto_loss, policy, reference, baseline, share).backward()
        assert torch.equal(policy.grad[1:].sign(), -(share[1:] - 0.5).sign())
        assert policy.grad[0].abs() < 1e-9
        # twice the weight of bad: two of three must call it good
        policy.grad = None
        expected_of_labels(kto_loss, policy, reference, baseline, share, (1.0, 2.0)).backward()
        assert torch.equal(policy.grad.sign(), -(share - 2 / 3).sign())


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0)])
def test_kto_ends_at_what_most_call_good(weights):
    reference, rewards = known_problem()
    share = torch.sigmoid(rewards)
    good = weights[0] * share > weights[1] * (1 - share)
    assert 0 < int(good.sum()) < len(RESPONSES)
    found = descended(reference, share, weights)
    assert float(found.exp()[good].sum()) > 0.99
    assert float(reference.exp()[good].sum()) < 0.95


def test_contradicting_labels_lead_kto_to_the_majority_and_dpo_where_the_reference_is():
    """Ethayarajh et al. 2024, theorem 4.3: p^(1/beta) pi_ref(a) < (1 - p)^(1/beta) pi_ref(b), and most prefer a."""
    share, reference = 0.7, torch.tensor([0.1, 0.9], dtype=torch.float64).log()
    assert share ** (1 / BETA) * 0.1 < (1 - share) ** (1 / BETA) * 0.9
    order = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def dpo(policy):
        rho = policy - reference
        return share * plackett_luce_loss(rho, order, [2], beta=BETA) + (1 - share) * plackett_luce_loss(
            rho, order.flip(0), [2], beta=BETA
        )

    odds = (share / (1 - share)) ** (1 / BETA) * 0.1 / 0.9
    found = trained(reference, lambda policy: dpo(policy).sum())
    assert float(found[0].exp()) == pytest.approx(odds / (1 + odds), abs=1e-3)
    assert float(found[0].exp()) < 0.5
    kto = descended(reference, torch.tensor([share, 1 - share], dtype=torch.float64))
    assert float(kto[0].exp()) > 0.99


def fixed_point_of_bco(reference, good_share, weights=(1.0, 1.0), rounds=12):
    """A policy that is BCO's minimiser with its own mean reward as delta."""
    policy = reference
    for _ in range(rounds):
        delta = (BETA * (policy - reference)).mean().detach()
        policy = trained(
            policy,
            lambda p, delta=delta: expected_of_labels(bco_loss, p, reference, delta, good_share, weights),
            steps=40,
        )
    return policy


def test_bco_has_its_fixed_point_at_the_optimum_of_the_objective():
    """Labels that are good with sigmoid(r), r = 0 on average: pi_ref exp(r / beta) / Z, from single responses."""
    reference, rewards = known_problem()
    best, share = optimum(reference, rewards), torch.sigmoid(rewards)
    assert total_variation(fixed_point_of_bco(reference, share), best) < 1e-2
    # there the slope is none; with any other delta it is some
    delta = (BETA * (best - reference)).mean().detach()
    for other, stays in ((0.0, True), (0.3, False)):
        logits = best.clone().requires_grad_()
        expected_of_labels(bco_loss, logits.log_softmax(0), reference, delta + other, share).backward()
        assert (float(logits.grad.abs().max()) < 1e-7) == stays


def test_weights_of_the_labels_make_up_for_a_share_that_is_not_half_in_bco():
    reference, rewards = known_problem()
    share = torch.sigmoid(rewards + 1)
    assert total_variation(fixed_point_of_bco(reference, share), optimum(reference, rewards)) > 0.1
    weighted = fixed_point_of_bco(reference, share, (math.exp(-1), 1.0))
    assert total_variation(weighted, optimum(reference, rewards)) < 1e-2
