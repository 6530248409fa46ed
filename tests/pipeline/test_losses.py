"""The loss by hand, by its formula's gradient, and against TRL's."""

import math

import pytest
import torch

from pipeline.losses import dpo_loss


def test_hand_values():
    four = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.5)]
    terms = dpo_loss(*four, beta=0.5)
    # z = 0.5 * ((-10 + 11) - (-12 + 11.5)) = 0.75
    assert terms.losses.item() == pytest.approx(math.log(1 + math.exp(-0.75)), abs=1e-6)
    assert terms.chosen_rewards.item() == pytest.approx(0.5)
    assert terms.rejected_rewards.item() == pytest.approx(-0.25)
    smoothed = dpo_loss(*four, beta=0.5, label_smoothing=0.1).losses.item()
    assert smoothed == pytest.approx(0.9 * math.log(1 + math.exp(-0.75)) + 0.1 * math.log(1 + math.exp(0.75)), abs=1e-6)


def test_equal_models_give_ln_2():
    values = torch.randn(7) - 100
    assert torch.allclose(dpo_loss(values, values - 3, values, values - 3, beta=0.3).losses, torch.tensor(math.log(2)))


def test_the_gradient_is_the_papers():
    """grad = -beta * sigmoid(r_l - r_w) * (grad log pi(y_w) - grad log pi(y_l)); Rafailov et al., section 4."""
    generator = torch.Generator().manual_seed(0)
    policy = [torch.randn(16, generator=generator).requires_grad_() for _ in range(2)]
    ref = [torch.randn(16, generator=generator) for _ in range(2)]
    beta = 0.7
    terms = dpo_loss(*policy, *ref, beta=beta)
    terms.losses.mean().backward()
    weight = torch.sigmoid(terms.rejected_rewards - terms.chosen_rewards)
    torch.testing.assert_close(policy[0].grad, -beta * weight / 16)
    torch.testing.assert_close(policy[1].grad, beta * weight / 16)


def test_long_responses_keep_their_digits():
    """float64 sums in, so that 1e-3 nats are seen beside 2000."""
    chosen = torch.tensor([-2000.001], dtype=torch.float64)
    terms = dpo_loss(chosen, chosen, chosen + 0.001, chosen, beta=1.0)
    assert terms.chosen_rewards.item() == pytest.approx(-0.001, rel=1e-6)
