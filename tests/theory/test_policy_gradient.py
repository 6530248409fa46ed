"""Where policy gradient on stored samples leads, in worlds where every sample, and every group of samples, can be enumerated.

Expectations are exact: each sample, or group, counts with its probability under the model that wrote it. Losses and targets are
those of training; what they are to do is worked out here, in float64, from the policy's distribution.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.rollouts import VARIANTS, PolicyGradientConfig
from pipeline.config.training import TrainConfig
from pipeline.training.objectives.advantages import targets_of, token_advantages
from pipeline.training.objectives.losses import PairLogps, preference_loss
from pipeline.training.objectives.policy_gradient import Normalisers, SampleLogps, policy_gradient_loss

BETA = 0.7


class World:
    """Responses of some words and an end, of at most `longest` tokens; a policy is a table of logits, a row for each beginning.

    Y responses of N tokens in all. `at_N` and `token_N`: a token's beginning and itself.
    """

    def __init__(self, words, longest):
        contexts = [ids for length in range(longest) for ids in itertools.product(range(words), repeat=length)]
        number_of = {ids: number for number, ids in enumerate(contexts)}
        ended = [(*ids, words) for ids in contexts]
        self.responses = ended + list(itertools.product(range(words), repeat=longest))
        self.shape = len(contexts), words + 1
        self.lengths = np.array([len(ids) for ids in self.responses])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        pairs = [(number_of[ids[:place]], ids[place]) for ids in self.responses for place in range(len(ids))]
        self.at_N, self.token_N = torch.tensor(pairs).T

    def random(self, seed, spread=1.0):
        generator = torch.Generator().manual_seed(seed)
        return spread * torch.randn(self.shape, generator=generator, dtype=torch.float64)

    def tokens(self, logits):
        """Log-probabilities of the tokens of all responses, [N]."""
        return logits.log_softmax(1)[self.at_N, self.token_N]

    def whole(self, logits):
        """Log-probabilities of all responses, [Y]; they are all there is."""
        numbers = torch.tensor(np.repeat(np.arange(len(self.responses)), self.lengths))
        return torch.zeros(len(self.responses), dtype=torch.float64).index_add(0, numbers, self.tokens(logits))

    def places(self, drawn):
        """Where the tokens of some responses stand among the N."""
        return torch.tensor(
            np.concatenate([np.arange(self.starts[number], self.starts[number + 1]) for number in drawn])
        )


WORLD = World(words=2, longest=3)
# one token each: every response stands alone
ONE_TOKEN = World(words=199, longest=1)


class Samples:
    """Groups of responses, each with a weight, as stored samples: `groups` [G, n] of numbers of responses."""

    def __init__(self, world, groups, weights, behaviour, reference, rewards):
        self.world, self.drawn, size = world, groups.reshape(-1), groups.shape[1]
        self.weights = np.repeat(weights, size)
        self.places = world.places(self.drawn)
        self.lengths = world.lengths[self.drawn]
        self.behaviour_N = world.tokens(behaviour)[self.places]
        self.reference_N = world.tokens(reference)[self.places]
        sums = torch.stack([world.whole(behaviour), world.whole(reference)]).numpy()[:, self.drawn]
        self.rows, self.behaviour, self.reference, self.rewards = range(len(groups)), behaviour, reference, rewards
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.columns = {"logps": self.behaviour_N.numpy(), "ref_logps": self.reference_N.numpy()}
        self.stored = SimpleNamespace(
            rewards=rewards.numpy()[self.drawn],
            sums_2S=sums,
            of=lambda row: range(row * size, (row + 1) * size),
            one_by_one=SimpleNamespace(
                logps=lambda number, name: self.columns[name][starts[number] : starts[number + 1]]
            ),
        )
        tokens = float((self.weights * self.lengths).sum())
        self.by = Normalisers(tokens, float(self.weights.sum()), float(world.lengths.max()))

    def loss_of(self, settings, beta=BETA, values=None):
        """The expected loss as a function of the policy's logits. `values`: a critic's of each beginning; else they are exact."""
        number_N = torch.tensor(np.repeat(np.arange(len(self.drawn)), self.lengths))
        by_token = None
        if settings.reads_values:
            exact = values_of(self.world, self.behaviour, self.reference, self.rewards, settings.kl_in_reward)
            self.columns["values"] = (exact if values is None else values)[self.world.at_N][self.places].numpy()
            counts = np.ones(len(self.drawn))
            by_token = torch.tensor(np.concatenate(token_advantages(self.stored, range(len(counts)), counts, settings)))
            targets = torch.zeros(len(counts), dtype=torch.float64)
        else:
            targets = torch.tensor(np.concatenate(targets_of(self.stored, self.rows, settings, beta)))
        lengths, weights = torch.tensor(self.lengths, dtype=torch.float64), torch.tensor(self.weights)

        def loss(logits):
            policy_N = self.world.tokens(logits)[self.places]
            reference_N = self.reference_N if settings.reads_reference else None
            x = SampleLogps(policy_N, self.behaviour_N, reference_N, number_N, lengths, targets, weights, by_token)
            return policy_gradient_loss(x, settings, beta, self.by).losses_S.sum()

        return loss


def values_of(world, behaviour, reference, rewards, kl_coef):
    """What is to be expected from each beginning on, under the behaviour: the reward, less kl_coef times the log-ratios to come."""
    numbers = torch.tensor(np.repeat(np.arange(len(world.responses)), world.lengths))
    gaps = world.tokens(behaviour) - world.tokens(reference)
    before = gaps.cumsum(0) - gaps
    so_far = before - before[torch.tensor(world.starts[:-1])][numbers]
    whole = world.whole(behaviour) - world.whole(reference)
    to_come, chances = rewards[numbers] - kl_coef * (whole[numbers] - so_far), world.whole(behaviour).exp()[numbers]
    sums = torch.zeros(2, world.shape[0], dtype=torch.float64)
    sums.index_add_(1, world.at_N, torch.stack([chances * to_come, chances]))
    return sums[0] / sums[1]


def in_groups(world, size, behaviour, reference, rewards):
    """Every group of `size` samples, with the probability that the behaviour writes it."""
    groups = np.array(list(itertools.product(range(len(world.responses)), repeat=size)))
    chances = world.whole(behaviour).exp().numpy()
    return Samples(world, groups, chances[groups].prod(1), behaviour, reference, rewards)


def exact_samples(world, seed):
    """A behaviour, and the one group in which each response stands as often as it is likely: as if infinitely many were drawn."""
    generator = np.random.default_rng(seed)
    parts = np.stack([generator.permutation([1, 1, 2]) for _ in range(world.shape[0])])
    behaviour = torch.tensor(np.log(parts / 4))
    times = np.rint(world.whole(behaviour).exp().numpy() * 4 ** world.lengths.max()).astype(int)
    return behaviour, np.repeat(np.arange(len(times)), times)[None]


def rewards_of(world, seed, spread=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return spread * torch.randn(len(world.responses), generator=generator, dtype=torch.float64)


def uphill(function, at):
    """The gradient of a function of logits."""
    logits = at.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def cosine(first, second):
    return float((first * second).sum() / (first.norm() * second.norm()))


def objective(world, reference, rewards, kl_coef=0.0):
    """E r - kl_coef KL(pi || ref), exactly."""

    def value(logits):
        policy = world.whole(logits)
        return (policy.exp() * (rewards - kl_coef * (policy - world.whole(reference)))).sum()

    return value


def optimum(reference, rewards, beta=BETA):
    """log pi* = log pi_ref + r / beta - log Z."""
    return (reference + rewards / beta).log_softmax(0)


def variation(first, second):
    return float(0.5 * (first.exp() - second.exp()).abs().sum())


def minimised(function, start):
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=800, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = function(logits)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()


# --- the direction of a step

# weighed by samples' own lengths a step leans to short ones; by a group's standard deviation, to prompts that are decided;
# quantiles are rewards in another unit
LEAST = {"grpo": 0.85, "gspo": 0.85, "dapo": 0.94, "cispo": 0.94, "qrpo": 0.9, "a2po": 0.98}
OF_ADVANTAGES = [name for name, facts in VARIANTS.items() if facts.advantage in ("leave_one_out", "centred", "group")]


@pytest.mark.parametrize(
    "variant", [name for name, facts in VARIANTS.items() if facts.advantage not in ("batch", "gae")]
)
def test_the_expected_step_goes_uphill(variant):
    """At pi = mu, over all groups of two and of three: exactly along the gradient of E r, or within a known angle of it."""
    settings = PolicyGradientConfig(variant=variant, **({"value_temperature": BETA} if variant == "a2po" else {}))
    for seed, size in ((0, 2), (1, 2), (2, 2), (3, 2), (0, 3)):
        reference, rewards = WORLD.random(seed), rewards_of(WORLD, seed)
        behaviour = reference if settings.facts.compares else WORLD.random(50 + seed)
        samples = in_groups(WORLD, size, behaviour, reference, rewards)
        step = -uphill(samples.loss_of(settings), behaviour)
        assert cosine(step, uphill(objective(WORLD, reference, rewards), behaviour)) > LEAST.get(variant, 1 - 1e-6)


@pytest.mark.parametrize("variant", OF_ADVANTAGES)
def test_with_advantages_less_a_baseline_every_loss_over_all_tokens_goes_straight_up(variant):
    """Leave-one-out advantages less the KL in the reward: the gradient of E r - kl KL(pi || ref), for any size of groups."""
    means = VARIANTS[variant].aggregation == "sample_means"
    settings = PolicyGradientConfig(variant=variant, advantage="leave_one_out", kl_coef=BETA, kl_in="reward")
    for seed, size in ((0, 2), (1, 2), (2, 3)):
        reference, rewards, behaviour = WORLD.random(seed), rewards_of(WORLD, seed), WORLD.random(50 + seed)
        samples = in_groups(WORLD, size, behaviour, reference, rewards)
        step = -uphill(samples.loss_of(settings), behaviour)
        found = cosine(step, uphill(objective(WORLD, reference, rewards, BETA), behaviour))
        assert (0.8 < found < 1 - 1e-4) if means else found > 1 - 1e-6


def test_advantages_over_a_step_go_straight_up():
    for seed in range(3):
        behaviour, group = exact_samples(WORLD, seed)
        reference, rewards = WORLD.random(seed), rewards_of(WORLD, seed)
        samples = Samples(WORLD, group, np.ones(1), behaviour, reference, rewards)
        for kl_coef in (0.0, BETA):
            step = -uphill(samples.loss_of(PolicyGradientConfig(variant="reinforce_pp", kl_coef=kl_coef)), behaviour)
            assert cosine(step, uphill(objective(WORLD, reference, rewards, kl_coef), behaviour)) > 1 - 1e-6


@pytest.mark.parametrize("kl_coef", [0.0, BETA])
def test_a_critic_that_is_right_or_is_a_baseline_alone_leads_straight_up(kl_coef):
    """PPO with exact values whatever lambda is; with any values if lambda is 1; else as far as the values are right."""
    for seed in range(3):
        reference, rewards, behaviour = WORLD.random(seed), rewards_of(WORLD, seed), WORLD.random(50 + seed)
        samples = in_groups(WORLD, 1, behaviour, reference, rewards)
        straight = uphill(objective(WORLD, reference, rewards, kl_coef), behaviour)
        wrong = torch.randn(WORLD.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for lam, values, exact in ((0.0, None, True), (0.95, None, True), (1.0, wrong, True), (0.0, wrong, False)):
            settings = PolicyGradientConfig(variant="ppo", gae_lambda=lam, kl_coef=kl_coef)
            found = cosine(-uphill(samples.loss_of(settings, values=values), behaviour), straight)
            assert (found > 1 - 1e-6) == exact


def forward_kls(world, reference, behaviour):
    """KL(ref || pi) of the next token, weighed by how often the behaviour is there: what k3 of the behaviour's tokens descends."""
    chances = world.whole(behaviour).exp()[torch.tensor(np.repeat(np.arange(len(world.responses)), world.lengths))]
    visits = torch.zeros(world.shape[0], dtype=torch.float64).index_add(0, world.at_N, chances)

    def value(logits):
        there = reference.log_softmax(1)
        return (visits * (there.exp() * (there - logits.log_softmax(1))).sum(1)).sum()

    return value


@pytest.mark.parametrize("variant", ["clip", "rloo", "topr", "cispo"])
def test_k3_in_the_loss_goes_down_the_other_divergence(variant):
    """Uphill of E r - kl KL(pi || ref) still, if not straight: it is KL(ref || pi) of each token that the loss descends."""
    settings = PolicyGradientConfig(variant=variant, advantage="leave_one_out", kl_coef=BETA, kl_in="loss")
    for seed in range(3):
        reference, rewards, behaviour = WORLD.random(seed), rewards_of(WORLD, seed), WORLD.random(50 + seed)
        samples = in_groups(WORLD, 2, behaviour, reference, rewards)
        step = -uphill(samples.loss_of(settings), behaviour)
        of_kl = uphill(forward_kls(WORLD, reference, behaviour), behaviour)
        of_reward = uphill(objective(WORLD, reference, rewards), behaviour)
        assert cosine(step, of_reward - BETA * of_kl) > 1 - 1e-6
        assert 0.6 < cosine(step, uphill(objective(WORLD, reference, rewards, BETA), behaviour)) < 1 - 1e-4


def test_whole_ratios_correct_for_samples_of_another_model():
    """rloo's ratio is the sample's: unclipped, its step is the policy's own gradient of E r wherever the samples come from."""
    for seed in range(3):
        reference, rewards = WORLD.random(seed), rewards_of(WORLD, seed)
        behaviour, policy = WORLD.random(50 + seed), WORLD.random(70 + seed)
        samples = in_groups(WORLD, 2, behaviour, reference, rewards)
        straight = uphill(objective(WORLD, reference, rewards), policy)
        bounds = {"epsilon": 1.0, "epsilon_high": 1e6}
        step = -uphill(samples.loss_of(PolicyGradientConfig(variant="rloo", **bounds)), policy)
        assert cosine(step, straight) > 1 - 1e-6
        # a token's ratio knows nothing of the tokens before it
        assert cosine(-uphill(samples.loss_of(PolicyGradientConfig(**bounds)), policy), straight) < 1 - 1e-3


# --- where it ends


def climbed(world, settings, reference, rewards, size=2, rounds=120, steps=2):
    """The policy after rounds of sampling by the last one, with some steps on the same samples each."""
    policy = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for _ in range(rounds):
        loss_of = in_groups(world, size, policy.detach().clone(), reference, rewards).loss_of(settings)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(policy).backward()
            optimizer.step()
        decay.step()
    return policy.detach()


def dpo_loss(world, reference, rewards):
    """The expected DPO loss of all pairs, each winner as likely as Bradley and Terry say."""
    w, lost = torch.tensor(list(itertools.permutations(range(len(rewards)), 2))).T
    wins, one = torch.sigmoid(rewards[w] - rewards[lost]), torch.ones(len(w), dtype=torch.float64)
    stored = world.whole(reference)

    def loss(logits):
        policy = world.whole(logits)
        sums = torch.stack([policy[w], policy[lost]])
        pairs = PairLogps(sums, torch.stack([stored[w], stored[lost]]), sums, torch.stack([one, one]), one, 1.0)
        return (wins * preference_loss(pairs, TrainConfig(beta=BETA)).losses).sum() / wins.sum()

    return loss


def test_policy_gradient_and_dpo_reach_the_same_policy():
    """pi_ref exp(r / beta) / Z: rounds of samples with the KL in their rewards, and pairs of the reference's responses."""
    reference, rewards = WORLD.random(0), rewards_of(WORLD, 0)
    best = optimum(WORLD.whole(reference), rewards)
    settings = PolicyGradientConfig(kl_coef=BETA, kl_in="reward")
    gradient = WORLD.whole(climbed(WORLD, settings, reference, rewards))
    dpo = WORLD.whole(minimised(dpo_loss(WORLD, reference, rewards), reference))
    assert variation(WORLD.whole(reference), best) > 0.2
    assert variation(gradient, best) < 1e-3
    assert variation(dpo, best) < 1e-3
    assert variation(gradient, dpo) < 1e-3


def test_ppo_reaches_it_too():
    """From single samples of a prompt, if its critic is right."""
    reference, rewards = WORLD.random(0), rewards_of(WORLD, 0)
    settings = PolicyGradientConfig(variant="ppo", kl_coef=BETA)
    found = WORLD.whole(climbed(WORLD, settings, reference, rewards, size=1))
    assert variation(found, optimum(WORLD.whole(reference), rewards)) < 1e-3


def test_k3_in_the_loss_ends_elsewhere():
    """Of single tokens where pi (r - E r) = kl (pi - ref), so pi = ref / (1 - (r - E r) / kl): heavier tails than pi*."""
    world = World(words=7, longest=1)
    reference, rewards = world.random(1), rewards_of(world, 1, spread=0.5)
    found = world.whole(climbed(world, PolicyGradientConfig(kl_coef=BETA, kl_in="loss"), reference, rewards))
    mean = (found.exp() * rewards).sum()
    expected = world.whole(reference) - torch.log(1 - (rewards - mean) / BETA)
    assert variation(found, expected) < 1e-3
    assert variation(found, optimum(world.whole(reference), rewards)) > 0.1


def test_a2po_reaches_the_optimum_of_the_objective():
    """From the reference's samples alone, with V* = beta log E exp(r / beta) exact."""
    reference, group = exact_samples(WORLD, 3)
    rewards = rewards_of(WORLD, 3)
    samples = Samples(WORLD, group, np.ones(1), reference, reference, rewards)
    loss = samples.loss_of(PolicyGradientConfig(variant="a2po", value_temperature=BETA))
    found, best = minimised(loss, reference), optimum(WORLD.whole(reference), rewards)
    assert variation(WORLD.whole(reference), best) > 0.2
    assert variation(WORLD.whole(found), best) < 1e-3
    assert float(loss(found)) < 1e-8


def test_qrpo_reaches_the_optimum_of_its_quantiles():
    """pi_ref exp(F(r) / beta) / Z, F the share of the reference's responses that are not better."""
    world = ONE_TOKEN
    parts = np.random.default_rng(0).integers(1, 5, world.shape)
    reference, rewards = torch.tensor(np.log(parts / parts.sum())), rewards_of(world, 0)
    times = np.rint(world.whole(reference).exp().numpy() * parts.sum()).astype(int)
    samples = Samples(world, np.repeat(np.arange(len(times)), times)[None], np.ones(1), reference, reference, rewards)
    found = world.whole(minimised(samples.loss_of(PolicyGradientConfig(variant="qrpo")), reference))
    chances = world.whole(reference).exp()
    quantiles = (chances[None, :] * (rewards[None, :] <= rewards[:, None])).sum(1)
    best = optimum(world.whole(reference), quantiles)
    assert variation(world.whole(reference), best) > 0.15
    assert variation(found, best) < 1e-3


@pytest.mark.parametrize(("beta", "within"), [(3.0, 0.02), (30.0, 5e-4)])
def test_apa_ends_near_mu_times_exp_of_the_advantage(beta, within):
    """mu exp(A / beta) is no distribution, its sum is above 1: of those that are one the squares choose rho - c exp(rho) = A / beta,
    rho = log(pi / mu), which is mu exp(A / beta) / Z if beta is large.
    """
    behaviour, group = exact_samples(WORLD, 3)
    rewards = rewards_of(WORLD, 3)
    samples = Samples(WORLD, group, np.ones(1), behaviour, behaviour, rewards)
    found = WORLD.whole(minimised(samples.loss_of(PolicyGradientConfig(variant="apa"), beta), behaviour))
    written = WORLD.whole(behaviour)
    best, moved = optimum(written, rewards, beta), variation(found, written)
    assert variation(found, best) < min(within, moved / 5)
    rho, size = found - written, group.shape[1]
    advantages = (rewards - (written.exp() * rewards).sum()) * size / (size - 1)
    slack = (rho - advantages / beta) / rho.exp()
    assert float(slack.std()) < 1e-5
