"""Every loss against TRL's on the same tensors, by hand where TRL has none, and by its paper's properties."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import log_softmax

from pipeline.config.training import TrainConfig
from pipeline.training.objectives.losses import (
    LOSSES,
    PairLogps,
    bradley_terry_loss,
    preference_loss,
    weighted_sums,
    wpo_weight,
)

PAIRS, WIDTH, VOCABULARY = 6, 9, 13
IN_TRL = sorted(LOSSES.keys() - {"ipo_sum", "simpo", "cpo", "orpo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"})
# TRL's sigmoid reads no label_smoothing; what it calls robust and exo_pair do
NEEDS_SMOOTHING = {"exo_pair": 0.02, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.2}


@pytest.fixture
def responses():
    """Random logits (float64) of chosen and rejected responses of different lengths, their tokens, and reference logps."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, WIDTH, (2 * PAIRS,), generator=generator)
    logits = torch.randn(2 * PAIRS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64) * 1.5
    ids = torch.randint(0, VOCABULARY, (2 * PAIRS, WIDTH + 1), generator=generator)
    # one prompt token, then the response
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = 1
    logps = log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    reference = logps + 0.4 * torch.randn(logps.shape, generator=generator, dtype=torch.float64)
    return SimpleNamespace(
        lengths=lengths.tolist(), logits=logits, ids=ids, mask=mask, logps=logps, reference=reference
    )


def ours(responses, train):
    def side(values, row):
        return values[row, : responses.lengths[row]]

    pairs = [(row, row + PAIRS) for row in range(PAIRS)]
    sums = {
        (name, alpha): torch.stack([weighted_sums([side(values, row) for row in pair], alpha) for pair in pairs], 1)
        for name, values in (("policy", responses.logps), ("reference", responses.reference))
        for alpha in (train.ld_alpha, None)
    }
    squares = (2 * log_softmax(responses.logits, -1)).logsumexp(-1)
    weights = torch.ones(PAIRS, dtype=torch.float64)
    if train.use_weighting:
        weights = torch.stack(
            [math.prod(wpo_weight(side(responses.logps, row), side(squares, row)) for row in pair) for pair in pairs]
        )
    lengths = torch.tensor(responses.lengths, dtype=torch.float64).view(2, PAIRS)
    return preference_loss(
        PairLogps(
            sums["policy", train.ld_alpha],
            sums["reference", train.ld_alpha],
            sums["policy", None],
            lengths,
            weights,
            float(lengths[0].mean()),
        ),
        train,
    )


def theirs(responses, train):
    """TRL's own loss code on the same tensors; only its trainer around it is made up."""
    if train.f_divergence_type == "alpha_divergence":  # their clamp knows no float64
        responses = SimpleNamespace(
            **{
                n: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for n, v in vars(responses).items()
            }
        )
    from trl.trainer.dpo_trainer import DPOTrainer

    def reference(row, other):
        values = responses.reference[row, : responses.lengths[row]]
        shared = min(responses.lengths[row], responses.lengths[other])
        return (
            values.sum() if train.ld_alpha is None else values[:shared].sum() + train.ld_alpha * values[shared:].sum()
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=train.ld_alpha,
        f_divergence_type=train.f_divergence_type,
        f_alpha_divergence_coef=train.f_alpha_divergence_coef,
        loss_types=train.loss_type,
        loss_weights=train.loss_weights or [1.0] * len(train.loss_type),
        beta=train.beta,
        label_smoothing=train.label_smoothing,
        use_weighting=train.use_weighting,
        args=SimpleNamespace(discopop_tau=train.discopop_tau),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": responses.ids,
        "attention_mask": torch.ones_like(responses.ids),
        "completion_mask": responses.mask,
        "ref_chosen_logps": torch.stack([reference(row, row + PAIRS) for row in range(PAIRS)]),
        "ref_rejected_logps": torch.stack([reference(row + PAIRS, row) for row in range(PAIRS)]),
    }
    logits = torch.nn.functional.pad(responses.logits, (0, 0, 0, 1))
    loss = DPOTrainer._compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs, return_outputs=False)
    return float(loss), trainer._metrics["train"]


def agree(responses, train):
    mine, (loss, metrics) = ours(responses, train), theirs(responses, train)
    assert float(mine.losses.double().mean()) == pytest.approx(loss, abs=1e-6, rel=1e-6)
    if train.loss_type == ["sft"]:  # theirs still shows rewards against a reference
        return loss
    for name, values in (("chosen", mine.chosen_rewards), ("rejected", mine.rejected_rewards)):
        assert float(values.mean()) == pytest.approx(metrics[f"rewards/{name}"][0], abs=1e-6)
    return loss


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", IN_TRL)
def test_each_loss_is_trls(responses, name, beta):
    agree(responses, TrainConfig(loss_type=name, beta=beta, label_smoothing=NEEDS_SMOOTHING.get(name, 0.0)))


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "sigmoid_norm"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_each_divergence_is_trls(responses, name, divergence):
    plain = {"loss_type": name, "beta": 0.5, "label_smoothing": NEEDS_SMOOTHING.get(name, 0.0)}
    more = {"f_alpha_divergence_coef": 0.3} if divergence == "alpha_divergence" else {}
    loss = agree(responses, TrainConfig(**plain, f_divergence_type=divergence, **more))
    assert loss != pytest.approx(theirs(responses, TrainConfig(**plain))[0], rel=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_zero", "sppo_hard"])
def test_ld_alpha_and_wpo_are_trls(responses, name):
    plain = theirs(responses, TrainConfig(loss_type=name))[0]
    assert agree(responses, TrainConfig(loss_type=name, ld_alpha=0.3)) != pytest.approx(plain, rel=1e-4)
    assert agree(responses, TrainConfig(loss_type=name, use_weighting=True)) != pytest.approx(plain, rel=1e-4)


def test_weighted_sums_of_losses_are_trls(responses):
    agree(responses, TrainConfig(loss_type=["sigmoid", "sft", "apo_down"], loss_weights=[0.8, 0.3, 2.0]))


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_reference_free_losses_are_trls_and_read_no_reference(responses, name):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    train = TrainConfig(loss_type=name, beta=0.6, **({"simpo_gamma": 0.3} if name == "simpo" else {}))
    mine = ours(responses, train)
    sums = torch.stack([responses.logps[row, :length].sum() for row, length in enumerate(responses.lengths)])
    means = sums / torch.tensor(responses.lengths)
    compared = (sums if name == "cpo" else means).chunk(2)
    trainer = SimpleNamespace(
        beta=0.6,
        alpha=0.0,
        label_smoothing=0.0,
        simpo_gamma=0.3,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )
    entropy = -sums[:PAIRS].sum() / sum(responses.lengths[:PAIRS])
    if name == "orpo":
        # theirs is subtracted from the cross-entropy
        found, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(trainer, *compared)
        expected = entropy - found.mean()
    else:
        found, chosen, rejected = CPOTrainer.cpo_loss(trainer, *compared)
        expected = found.mean() + (entropy if name == "cpo" else 0)
    assert float(mine.losses.double().mean()) == pytest.approx(float(expected), abs=2e-6)
    torch.testing.assert_close(mine.chosen_rewards, chosen.float())
    torch.testing.assert_close(mine.rejected_rewards, rejected.float())
    responses.reference += 100
    assert torch.equal(ours(responses, train).losses, mine.losses)


def one_pair(chosen, rejected, ref_chosen, ref_rejected, tokens=(1.0, 1.0)):
    column = [
        torch.tensor([[w], [lost]], dtype=torch.float64) for w, lost in ((chosen, rejected), (ref_chosen, ref_rejected))
    ]
    lengths = torch.tensor(tokens, dtype=torch.float64)[:, None]
    return PairLogps(column[0], column[1], column[0], lengths, torch.ones(1, dtype=torch.float64), tokens[0])


def test_hand_values():
    pair = one_pair(-10.0, -12.0, -11.0, -11.5)
    terms = preference_loss(pair, TrainConfig(beta=0.5))
    # z = 0.5 * ((-10 + 11) - (-12 + 11.5)) = 0.75
    assert terms.losses.item() == pytest.approx(math.log(1 + math.exp(-0.75)), abs=1e-6)
    assert terms.chosen_rewards.item() == pytest.approx(0.5)
    assert terms.rejected_rewards.item() == pytest.approx(-0.25)
    smoothed = preference_loss(pair, TrainConfig(beta=0.5, label_smoothing=0.1)).losses.item()
    assert smoothed == pytest.approx(0.9 * math.log(1 + math.exp(-0.75)) + 0.1 * math.log(1 + math.exp(0.75)), abs=1e-6)
    # (1.5 - 1 / (2 * 0.4))^2 of sums, (1/4 + 0.5/2 - 1.25)^2 of means: no sign or factor gives the same by chance
    assert preference_loss(pair, TrainConfig(loss_type="ipo_sum", beta=0.4)).losses.item() == pytest.approx(0.0625)
    of_means = one_pair(-10.0, -12.0, -11.0, -11.5, tokens=(4.0, 2.0))
    assert preference_loss(of_means, TrainConfig(loss_type="ipo", beta=0.4)).losses.item() == pytest.approx(0.5625)
    ranked = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]))
    assert ranked.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert (ranked.chosen_rewards.item(), ranked.rejected_rewards.item()) == (2.0, 0.5)


def test_equal_models_give_ln_2():
    pair = one_pair(-100.0, -103.0, -100.0, -103.0)
    assert preference_loss(pair, TrainConfig(beta=0.3)).losses.item() == pytest.approx(math.log(2))


def test_long_responses_keep_their_digits():
    """float64 sums in, so that 1e-3 nats are seen beside 2000."""
    terms = preference_loss(one_pair(-2000.001, -2000.001, -2000.0, -2000.001), TrainConfig(beta=1.0))
    assert terms.chosen_rewards.item() == pytest.approx(-0.001, rel=1e-6)


def test_a_certain_response_has_a_finite_orpo_loss():
    terms = preference_loss(one_pair(0.0, -3.0, 0.0, 0.0), TrainConfig(loss_type="orpo"))
    assert math.isfinite(terms.losses.item())
    # a certain rejected one: odds of 1e6, the largest that are told apart
    terms = preference_loss(one_pair(-3.0, 0.0, 0.0, 0.0), TrainConfig(loss_type="orpo", beta=1.0))
    odds = math.exp(-3) / (1 - math.exp(-3))
    assert terms.losses.item() == pytest.approx(3 + math.log(1e6) - math.log(odds), abs=0.1)
