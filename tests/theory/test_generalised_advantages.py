"""Where advantages by values lead, in a world of which every response is known: up the expected reward, whatever lambda is if the
values are true, and whatever the values are if lambda is 1.
"""

import itertools

import numpy as np
import pytest
import torch

from pipeline.training.objectives.advantages import generalised_advantages

TOKENS, LONGEST, END = 3, 3, 0


def responses():
    """All responses: up to LONGEST tokens, ended by END or cut off."""
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(TOKENS), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST):
                yield tokens


class World:
    """A policy with a logit of its own for every token after every beginning, a reward of every response, and both's true values."""

    def __init__(self, seed, kl_coef):
        draw = np.random.default_rng(seed)
        begins = sorted({tokens[:at] for tokens in responses() for at in range(len(tokens))})
        self.logits = {begin: torch.tensor(draw.normal(size=TOKENS), requires_grad=True) for begin in begins}
        self.reference = {begin: torch.log_softmax(torch.tensor(draw.normal(size=TOKENS)), 0) for begin in begins}
        self.rewards = {tokens: float(draw.normal()) for tokens in responses()}
        self.kl_coef = kl_coef

    def logps(self, tokens):
        return [torch.log_softmax(self.logits[tokens[:at]], 0)[token] for at, token in enumerate(tokens)]

    def token_rewards(self, tokens):
        gaps = [
            float(own.detach()) - float(self.reference[tokens[:at]][tokens[at]])
            for at, own in enumerate(self.logps(tokens))
        ]
        rewards = -self.kl_coef * np.array(gaps)
        rewards[-1] += self.rewards[tokens]
        return rewards

    def probability(self, tokens):
        return torch.stack(self.logps(tokens)).sum().exp()

    def value(self, begin):
        """What is still to come after `begin`, on average."""
        on = [tokens for tokens in responses() if tokens[: len(begin)] == begin and len(tokens) > len(begin)]
        chances = np.array([float(self.probability(tokens).detach()) for tokens in on])
        to_come = [self.token_rewards(tokens)[len(begin) :].sum() for tokens in on]
        return float(chances @ to_come / chances.sum())

    def gradient(self, objective):
        grads = torch.autograd.grad(objective, list(self.logits.values()))
        return torch.cat(grads).numpy()

    def uphill(self):
        """The gradient of the expected reward, less kl_coef times the KL to the reference."""
        total = torch.zeros((), dtype=torch.float64)
        for tokens in responses():
            logps = self.logps(tokens)
            gap = sum(own - self.reference[tokens[:at]][tokens[at]] for at, own in enumerate(logps))
            total = total + self.probability(tokens) * (self.rewards[tokens] - self.kl_coef * gap)
        return self.gradient(total)

    def by_values(self, values, lam):
        """The expected policy gradient with advantages by `values`."""
        total = torch.zeros((), dtype=torch.float64)
        for tokens in responses():
            own = np.array([values(tokens[:at]) for at in range(len(tokens))])
            advantages = torch.tensor(generalised_advantages(self.token_rewards(tokens), own, 1.0, lam))
            total = total + self.probability(tokens).detach() * (advantages * torch.stack(self.logps(tokens))).sum()
        return self.gradient(total)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_true_values_lead_uphill_whatever_lambda_is(kl_coef, lam):
    world = World(0, kl_coef)
    assert world.by_values(world.value, lam) == pytest.approx(world.uphill(), abs=1e-10)


def test_wrong_values_lead_uphill_at_lambda_one_alone():
    world = World(1, 0.2)
    wrong = {begin: float(np.random.default_rng(len(begin)).normal()) for begin in world.logits}
    assert world.by_values(wrong.get, 1.0) == pytest.approx(world.uphill(), abs=1e-10)
    assert np.abs(world.by_values(wrong.get, 0.5) - world.uphill()).max() > 1e-2


def test_true_values_leave_less_chance_in_the_advantages():
    """What a critic is for: the mean square of what a token's advantage is."""
    world = World(2, 0.0)

    def spread(values, lam):
        found = 0.0
        for tokens in responses():
            own = np.array([values(tokens[:at]) for at in range(len(tokens))])
            advantages = generalised_advantages(world.token_rewards(tokens), own, 1.0, lam)
            found += float(world.probability(tokens).detach()) * float((advantages**2).sum())
        return found

    none = spread(lambda _: 0.0, 1.0)
    assert spread(world.value, 0.0) < spread(world.value, 0.95) < spread(world.value, 1.0) < none
