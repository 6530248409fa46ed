"""The mathematics the product stands on, on problems where every response can be enumerated; in float64."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import kl_div, logsigmoid

from pipeline.config.training import TrainConfig
from pipeline.training.objectives.losses import PairLogps, bradley_terry_loss, preference_loss

# every response of one to three tokens out of three
RESPONSES = [ids for length in (1, 2, 3) for ids in itertools.product(range(3), repeat=length)]
BETA = 0.7


def distribution(generator):
    return torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64).log_softmax(0)


@pytest.fixture
def problem():
    """Reference log-probabilities and rewards of every response."""
    generator = torch.Generator().manual_seed(11)
    rewards = torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
    return distribution(generator), rewards


def optimum(reference, rewards):
    """log pi* = log pi_ref + r / beta - log Z."""
    return (reference + rewards / BETA).log_softmax(0)


def expected_loss(policy, reference, rewards):
    """The DPO loss of every ordered pair, weighted with the Bradley-Terry probability that the first wins."""
    w, lost = torch.tensor(list(itertools.permutations(range(len(RESPONSES)), 2))).T
    one = torch.ones(len(w), dtype=torch.float64)
    pair = PairLogps(
        torch.stack([policy[w], policy[lost]]),
        torch.stack([reference[w], reference[lost]]),
        torch.stack([policy[w], policy[lost]]),
        torch.stack([one, one]),
        one,
        1.0,
    )
    wins = torch.sigmoid(rewards[w] - rewards[lost])
    return (wins * preference_loss(pair, TrainConfig(beta=BETA)).losses).sum() / wins.sum()


def trained(reference, rewards):
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits.log_softmax(0), reference, rewards)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def test_minimising_the_expected_loss_reaches_the_optimum_of_the_objective(problem):
    """Rafailov et al. 2023, equations 4 and 7: the minimiser is pi_ref exp(r / beta) / Z."""
    reference, rewards = problem
    start, found = reference.exp(), trained(reference, rewards).exp()
    best = optimum(reference, rewards).exp()
    variation = 0.5 * (found - best).abs().sum()
    assert 0.5 * (start - best).abs().sum() > 0.2
    assert variation < 1e-3


def test_differences_of_rewards_are_recovered(problem):
    """beta log(pi / pi_ref) of the minimiser differs from r by one constant, beta log Z."""
    reference, rewards = problem
    offset = BETA * (trained(reference, rewards) - reference) - rewards
    assert float(offset.std()) < 5e-3
    assert float(offset.mean()) == pytest.approx(-BETA * float((reference + rewards / BETA).logsumexp(0)), abs=5e-3)


def test_the_optimum_maximises_reward_less_divergence(problem):
    """E r - beta KL(pi || pi_ref) of pi* is beta log Z, and above that of any other policy."""
    reference, rewards = problem

    def objective(policy):
        return float((policy.exp() * (rewards - BETA * (policy - reference))).sum())

    best = optimum(reference, rewards)
    assert objective(best) == pytest.approx(BETA * float((reference + rewards / BETA).logsumexp(0)), abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-2, 0.3, 3.0):
        other = (best + scale * torch.randn(best.shape, generator=generator, dtype=torch.float64)).log_softmax(0)
        assert objective(other) < objective(best)


def test_autograds_gradient_is_the_papers():
    """-beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)): Rafailov et al. 2023, section 4."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 16, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    ones = torch.ones(2, 16, dtype=torch.float64)
    terms = preference_loss(PairLogps(policy, reference, policy, ones, ones[0], 1.0), TrainConfig(beta=BETA))
    terms.losses.mean().backward()
    weight = BETA * torch.sigmoid(terms.rejected_rewards - terms.chosen_rewards).double() / 16
    torch.testing.assert_close(policy.grad, torch.stack([-weight, weight]), atol=1e-7, rtol=1e-5)


def test_bradley_terry_recovers_known_rewards():
    """From win shares of every pair the loss's minimiser is the rewards, up to a constant."""
    generator = torch.Generator().manual_seed(2)
    known = torch.randn(7, generator=generator, dtype=torch.float64)
    w, lost = torch.tensor(list(itertools.permutations(range(7), 2))).T
    wins = torch.sigmoid(known[w] - known[lost])
    found = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (wins * bradley_terry_loss(found[w], found[lost]).losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close((found - found.mean()).detach(), known - known.mean(), atol=1e-5, rtol=0)


def test_the_divergence_is_positive_and_zero_only_for_equals():
    """KL(P || Q) = sum P log(P / Q) >= 0, by hand, against torch's, and 0 for P = Q alone."""
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64).log(), torch.tensor([0.25, 0.75], dtype=torch.float64).log()

    def divergence(first, second):
        return float((first.exp() * (first - second)).sum())

    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        p, q = distribution(generator), distribution(generator)
        assert divergence(p, q) == pytest.approx(float(kl_div(q, p, log_target=True, reduction="sum")))
        assert divergence(p, q) > 0
        assert divergence(p, p) == 0


def test_the_expected_loss_of_the_optimum_is_the_entropy_of_the_preferences(problem):
    """Nothing can be below it: the Bayes loss of Bradley-Terry preferences."""
    reference, rewards = problem
    w, lost = torch.tensor(list(itertools.permutations(range(len(RESPONSES)), 2))).T
    wins = torch.sigmoid(rewards[w] - rewards[lost])
    bayes = -(wins * logsigmoid(rewards[w] - rewards[lost])).sum() / wins.sum()
    assert float(expected_loss(optimum(reference, rewards), reference, rewards)) == pytest.approx(
        float(bayes), abs=1e-6
    )
