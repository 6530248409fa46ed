"""Losses of lists and of margins against their papers' formulas in float64, and where TRL has one against TRL's."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.training import TrainConfig
from pipeline.training.objectives.losses import PairLogps, bradley_terry_loss, preference_loss
from pipeline.training.objectives.ranked import (
    best_and_worst,
    margin_loss,
    plackett_luce_loss,
    rpo_bwd_kl_loss,
    rpo_fwd_kl_loss,
    rpo_sq_loss,
)

SIZES = [4, 2, 1, 5, 3]


def draw(count, seed=0, scale=2.0):
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(sizes):
    """Scores that make every list's order that of its places, best first."""
    return torch.cat([-torch.arange(size, dtype=torch.float64) for size in sizes])


# --- lists


def papers_plackett_luce(rewards, scores):
    """-log prod_k exp(r_k) / sum_j exp(r_j), j over what is not yet drawn when k's tie begins; float64, by loops."""
    loss = torch.zeros((), dtype=torch.float64)
    for k, score in enumerate(scores):
        left = [rewards[j] for j, other in enumerate(scores) if other <= score]
        loss = loss - (rewards[k] - torch.stack(left).exp().sum().log())
    return loss


@pytest.mark.parametrize("ties", [False, True])
def test_plackett_luce_and_its_gradient_are_the_papers(ties):
    rho = draw(sum(SIZES)).requires_grad_()
    scores = orders(SIZES)
    if ties:
        scores = (scores / 2).floor()
    expected = torch.stack(
        [
            papers_plackett_luce(0.3 * values, of_list.tolist())
            for values, of_list in zip(rho.split(SIZES), scores.split(SIZES), strict=True)
        ]
    )
    wanted = torch.autograd.grad(expected.mean(), rho)[0]
    losses = plackett_luce_loss(rho, scores, SIZES, beta=0.3)
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=0)
    losses.mean().backward()
    torch.testing.assert_close(rho.grad, wanted, atol=1e-7, rtol=1e-5)
    assert losses.dtype == torch.float32
    # a list of one has nothing to learn, and adds nothing that is not a number
    assert losses[2] == 0
    assert rho.grad.split(SIZES)[2].item() == 0


def test_a_list_of_two_is_the_sigmoid_loss():
    policy, reference = draw(12, 1).view(2, 6), draw(12, 2).view(2, 6)
    policy.requires_grad_()
    ones = torch.ones(2, 6, dtype=torch.float64)
    pairs = preference_loss(PairLogps(policy, reference, policy, ones, ones[0], 1.0), TrainConfig(beta=0.4))
    wanted = torch.autograd.grad(pairs.losses.sum(), policy)[0]
    losses = plackett_luce_loss((policy - reference).T.flatten(), orders([2] * 6), [2] * 6, beta=0.4)
    torch.testing.assert_close(losses, pairs.losses, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), policy)[0], wanted, atol=1e-7, rtol=1e-5)


def test_the_probabilities_of_all_orders_add_up_to_one():
    rho = draw(4, 3)
    drawn = list(itertools.permutations(range(4)))
    losses = plackett_luce_loss(
        torch.cat([rho[list(order)] for order in drawn]), orders([4] * len(drawn)), [4] * len(drawn), beta=0.6
    )
    assert losses.double().neg().exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_order_is_that_of_scores_and_lists_do_not_touch_each_other():
    rho, scores = draw(9, 4), draw(9, 5)
    together = plackett_luce_loss(rho, scores, [5, 4], beta=0.5)
    mixed = torch.tensor([3, 0, 4, 1, 2])
    moved = torch.cat([rho[:5][mixed], 7 + rho[5:]]), torch.cat([scores[:5][mixed], 3 + scores[5:]])
    torch.testing.assert_close(plackett_luce_loss(*moved, [5, 4], beta=0.5), together, atol=1e-5, rtol=0)
    alone = plackett_luce_loss(rho[:5], scores[:5], [5], beta=0.5)
    torch.testing.assert_close(alone, together[:1])


def test_ties_share_a_denominator():
    """By hand: exp(beta rho) of 3, 2 and 1, the first two tied: (3/6) (2/6) (1/1)."""
    rho = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).log() / 0.5
    scores = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert plackett_luce_loss(rho, scores, [3], beta=0.5).item() == pytest.approx(-math.log(1 / 6))
    ordered = plackett_luce_loss(rho, orders([3]), [3], beta=0.5).item()
    assert ordered == pytest.approx(-math.log(3 / 6 * 2 / 3))
    # all tied: least where all are equal
    flat = torch.zeros(3, dtype=torch.float64)
    assert plackett_luce_loss(flat, flat, [3], beta=1.0).item() == pytest.approx(3 * math.log(3))
    assert plackett_luce_loss(rho, flat, [3], beta=0.5).item() > 3 * math.log(3)


def test_a_score_that_is_no_number_is_no_response_that_vanishes():
    scores = torch.tensor([1.0, float("nan"), 0.0], dtype=torch.float64)
    assert not plackett_luce_loss(draw(3), scores, [3], beta=1.0).isfinite().any()


def test_far_rewards_give_finite_losses():
    rho = torch.tensor([-1e4, 1e4, 0.0, 1e4], dtype=torch.float64, requires_grad=True)
    losses = plackett_luce_loss(rho, orders([2, 2]), [2, 2], beta=1.0)
    assert losses.tolist() == [2e4, 1e4]
    losses.sum().backward()
    assert rho.grad.tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_best_and_worst_are_the_ends_of_each_list():
    values = torch.arange(9.0)
    assert best_and_worst(values, [4, 1, 2, 2]).tolist() == [[0.0, 4.0, 5.0, 7.0], [3.0, 4.0, 6.0, 8.0]]


# --- margins


def papers_rpo(z, target, distance):
    p, q = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(-target))
    if distance == "sq":
        return (z - target) ** 2
    first, second = (q, p) if distance == "bwd_kl" else (p, q)
    return first * torch.log(first / second) + (1 - first) * torch.log((1 - first) / (1 - second))


RPO = {"sq": rpo_sq_loss, "bwd_kl": rpo_bwd_kl_loss, "fwd_kl": rpo_fwd_kl_loss}


@pytest.mark.parametrize("distance", RPO)
def test_rpo_and_its_gradient_are_the_papers(distance):
    rho_w, rho_l, margins = draw(8, 1).requires_grad_(), draw(8, 2).requires_grad_(), draw(8, 3).abs()
    expected = papers_rpo(0.3 * (rho_w - rho_l), 0.7 * margins, distance)
    wanted = torch.autograd.grad(expected.mean(), (rho_w, rho_l))
    losses = RPO[distance](rho_w, rho_l, margins, beta=0.3, eta=0.7)
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=1e-6)
    found = torch.autograd.grad(losses.mean(), (rho_w, rho_l))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-5)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("distance", RPO)
def test_rpo_is_zero_where_rewards_differ_as_scores_do_and_there_alone(distance):
    margins = draw(8, 3)
    rho_w = (0.7 * margins / 0.3).requires_grad_()
    losses = RPO[distance](rho_w, torch.zeros(8, dtype=torch.float64), margins, beta=0.3, eta=0.7)
    torch.testing.assert_close(losses, torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        torch.autograd.grad(losses.sum(), rho_w)[0], torch.zeros(8, dtype=torch.float64), atol=1e-6, rtol=0
    )
    for other in (-0.5, 0.5):
        assert (RPO[distance](rho_w + other, torch.zeros(8), margins, beta=0.3, eta=0.7) > 1e-5).all()


def test_rpo_of_a_sure_margin_is_dpo():
    """The backward divergence of eta m -> infinity is DPO's loss; of m = 0 that of labels which are wrong half of the time."""
    rho_w, rho_l = draw(8, 1), draw(8, 2)
    sure = rpo_bwd_kl_loss(rho_w, rho_l, torch.full((8,), 80.0, dtype=torch.float64), beta=0.3, eta=1.0)
    z = 0.3 * (rho_w - rho_l)
    torch.testing.assert_close(sure.double(), torch.log1p(torch.exp(-z)), atol=1e-6, rtol=0)
    unsure = rpo_bwd_kl_loss(rho_w, rho_l, torch.zeros(8, dtype=torch.float64), beta=0.3, eta=1.0)
    half = (torch.log1p(torch.exp(-z)) + torch.log1p(torch.exp(z))) / 2 - math.log(2)
    torch.testing.assert_close(unsure.double(), half, atol=1e-6, rtol=0)


def test_rpo_by_hand():
    """z = 0.5 * (2 - (-1)) = 1.5, eta m = 0.25 * 2 = 0.5."""
    one = [torch.tensor([value], dtype=torch.float64) for value in (2.0, -1.0, 2.0)]
    p, q = 1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))
    assert rpo_sq_loss(*one, beta=0.5, eta=0.25).item() == pytest.approx(1.0)
    backward = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert rpo_bwd_kl_loss(*one, beta=0.5, eta=0.25).item() == pytest.approx(backward)
    forward = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert rpo_fwd_kl_loss(*one, beta=0.5, eta=0.25).item() == pytest.approx(forward)


@pytest.mark.parametrize("distance", RPO)
def test_far_margins_give_finite_losses(distance):
    rho_w = torch.tensor([-300.0, 300.0], dtype=torch.float64, requires_grad=True)
    losses = RPO[distance](rho_w, torch.zeros(2), torch.tensor([300.0, -300.0]), beta=1.0, eta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert rho_w.grad.isfinite().all()


def test_a_reward_model_with_margins_is_trls():
    from trl.trainer.reward_trainer import RewardTrainer

    chosen, rejected, margins = draw(6, 1).requires_grad_(), draw(6, 2), draw(6, 3).abs()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        args=SimpleNamespace(center_rewards_coefficient=None),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.ones(12, 1), "attention_mask": torch.ones(12, 1), "margin": margins}
    scores = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    loss = RewardTrainer.compute_loss(trainer, lambda **_: scores, inputs)
    wanted = torch.autograd.grad(loss, chosen)[0]
    mine = margin_loss(chosen, rejected, margins)
    assert mine.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(mine.mean(), chosen)[0], wanted, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        margin_loss(chosen, rejected, torch.zeros(6, dtype=torch.float64)), bradley_terry_loss(chosen, rejected).losses
    )
    # stored margins have more digits than scores of a model
    assert margin_loss(chosen.float(), rejected.float(), margins).dtype == torch.float32
