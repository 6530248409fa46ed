"""KTO and BCO against TRL's own code on the same tensors, and against their papers' formulas in float64."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from pipeline.training.inputs.responses import RunningMean
from pipeline.training.objectives.unpaired import (
    bco_loss,
    kl_baseline,
    kto_loss,
    measured_responses,
)


def baseline(policy, reference):
    """KTO's, as training sums it up."""
    return kl_baseline((policy - reference).sum(), torch.tensor(float(len(policy))))


def mean_of(rewards):
    """BCO's mean reward, as training keeps it."""
    running = RunningMean()
    running.add(float(rewards.detach().double().sum()), len(rewards))
    return torch.tensor(running.mean, dtype=torch.float64)


ROWS, WIDTH, VOCABULARY = 9, 7, 11
LABELS = {
    "mixed": [True, False, True, True, False, False, True, False, True],
    "all good": [True] * ROWS,
    "all bad": [False] * ROWS,
}


def draw(seed, rows=ROWS, shift=0.0):
    """Sums of policy and reference, of responses and of mismatched ones, float64."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(4, rows, generator=generator, dtype=torch.float64) - 40
    values[2] += shift
    return values


def shown(terms, policy, good):
    return {
        name: float(total / count) for name, (total, count) in measured_responses(terms, policy, good).means.items()
    }


# --- TRL's own code


@pytest.fixture
def sequences():
    """Random logits (float64) of responses and of mismatched ones, their tokens, and reference sums."""
    generator = torch.Generator().manual_seed(4)
    logits = 1.5 * torch.randn(2, ROWS, WIDTH + 1, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (2, ROWS, WIDTH + 1), generator=generator)
    # one prompt token, then a response of 1 to WIDTH tokens
    lengths = torch.randint(1, WIDTH + 1, (2, ROWS, 1), generator=generator)
    places = torch.arange(WIDTH + 1)
    mask = ((places > 0) & (places <= lengths)).long()
    logps = logits[:, :, :-1].log_softmax(-1).gather(3, ids[:, :, 1:, None])[..., 0]
    policy = (logps * mask[:, :, 1:]).sum(-1)
    reference = policy + 2 * torch.randn(policy.shape, generator=generator, dtype=torch.float64)
    reference[1] -= 1.5
    return SimpleNamespace(logits=logits, ids=ids, mask=mask, policy=policy, reference=reference)


def trls_kto(sequences, labels, beta, weights):
    """TRL's own loss code; only its trainer around it is made up."""
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        use_liger_kernel=False,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    names = ("", "KL_")
    inputs = {
        "label": torch.tensor(labels),
        "ref_logps": sequences.reference[0],
        "ref_KL_logps": sequences.reference[1],
    }
    for prefix, ids, mask in zip(names, sequences.ids, sequences.mask, strict=True):
        inputs |= {f"{prefix}input_ids": ids, f"{prefix}completion_mask": mask}
        inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)

    def model(input_ids, **_):
        return SimpleNamespace(logits=sequences.logits[int(torch.equal(input_ids, sequences.ids[1]))])

    loss = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items() if isinstance(values, list)}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(("beta", "weights"), [(0.1, (1.0, 1.0)), (0.7, (1.5, 0.4))])
def test_kto_is_trls(sequences, labels, beta, weights):
    sequences.logits.requires_grad_()
    loss, metrics = trls_kto(sequences, labels, beta, weights)
    gradient = torch.autograd.grad(loss, sequences.logits)[0]
    logps = sequences.logits[:, :, :-1].log_softmax(-1).gather(3, sequences.ids[:, :, 1:, None])[..., 0]
    policy = (logps * sequences.mask[:, :, 1:]).sum(-1)
    z0 = baseline(policy[1], sequences.reference[1])
    good = torch.tensor(labels)
    mine = kto_loss(
        policy[0],
        sequences.reference[0],
        good,
        z0,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    assert mine.losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(mine.losses.mean(), sequences.logits)[0], gradient, atol=1e-6, rtol=0
    )
    assert z0.item() == pytest.approx(metrics["kl"], abs=1e-9)
    assert z0 > 0.1
    found = shown(mine, policy[0], good)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        # what a step has none of TRL leaves out
        assert found[name] == pytest.approx(metrics.get(name, math.nan), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_bco_is_trls_over_several_steps(labels):
    """Its running mean too, which counts a step before the step's loss reads it."""
    from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

    trainer = SimpleNamespace(
        beta=0.4,
        match_underlying_distribution=False,
        running=RunningMoments(SimpleNamespace(use_distributed=False)),
    )
    good, running = torch.tensor(labels), RunningMean()
    for step in range(4):
        policy, reference = draw(step)[:2] + step
        running.add(float((trainer.beta * (policy - reference)).sum()), len(policy))
        delta_of = torch.tensor(running.mean, dtype=torch.float64)
        mine = bco_loss(policy, reference, good, delta_of, beta=trainer.beta)
        losses, chosen, rejected, delta = BCOTrainer.bco_loss(
            trainer, policy[good], policy[~good], reference[good], reference[~good], None, None
        )
        order = torch.cat([torch.nonzero(good)[:, 0], torch.nonzero(~good)[:, 0]])
        torch.testing.assert_close(mine.losses[order].double(), losses, atol=1e-6, rtol=0)
        torch.testing.assert_close(mine.rewards[order].double(), torch.cat([chosen, rejected]), atol=1e-6, rtol=0)
        assert float(running.mean) == pytest.approx(float(delta), abs=1e-6)
        assert float(mine.baseline) == pytest.approx(float(delta), abs=1e-6)
    assert float(running.count) == pytest.approx(trainer.running.count)


# --- the papers' formulas, float64


def papers_kto(policy, reference, good, mismatched, mismatched_reference, beta, weights):
    """lambda_y - v of equations 6 and 7, response by response."""
    z0 = max(0.0, float((mismatched - mismatched_reference).detach().mean()))
    losses = []
    for logp, ref, label in zip(policy, reference, good.tolist(), strict=True):
        gain = beta * (logp - ref - z0) if label else beta * (z0 - logp + ref)
        weight = weights[0] if label else weights[1]
        losses.append(weight - weight / (1 + torch.exp(-gain)))
    return torch.stack(losses)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_kto_and_its_gradient_are_the_papers(labels, shift):
    policy, reference, mismatched, mismatched_reference = draw(7, shift=shift)
    policy.requires_grad_()
    mismatched.requires_grad_()
    good, weights = torch.tensor(labels), (0.8, 1.7)
    expected = papers_kto(policy, reference, good, mismatched, mismatched_reference, 0.3, weights)
    z0 = baseline(mismatched, mismatched_reference)
    terms = kto_loss(policy, reference, good, z0, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    torch.testing.assert_close(terms.losses.double(), expected, atol=1e-6, rtol=0)
    wanted = torch.autograd.grad(expected.mean(), policy)[0]
    terms.losses.mean().backward()
    torch.testing.assert_close(policy.grad, wanted, atol=1e-7, rtol=1e-5)
    assert mismatched.grad is None
    torch.testing.assert_close(terms.rewards.double(), 0.3 * (policy - reference).detach(), atol=1e-6, rtol=0)
    assert terms.losses.dtype == terms.rewards.dtype == torch.float32
    assert not terms.rewards.requires_grad


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_bco_and_its_gradient_are_the_papers(labels):
    policy, reference = draw(8)[:2]
    policy.requires_grad_()
    good = torch.tensor(labels)
    rewards = 0.3 * (policy - reference)
    delta = rewards.detach().mean()
    expected = torch.where(good, -1.5 * logsigmoid(rewards - delta), -0.4 * logsigmoid(delta - rewards))
    wanted = torch.autograd.grad(expected.mean(), policy)[0]
    terms = bco_loss(policy, reference, good, mean_of(rewards), beta=0.3, desirable_weight=1.5, undesirable_weight=0.4)
    torch.testing.assert_close(terms.losses.double(), expected, atol=1e-6, rtol=0)
    terms.losses.mean().backward()
    torch.testing.assert_close(policy.grad, wanted, atol=1e-7, rtol=1e-5)
    assert not terms.rewards.requires_grad


# --- the baselines


def test_the_baseline_is_the_mean_and_no_less_than_0():
    """The mean is bounded, not its terms: 3 and -2 give 0.5, -3 and 2 give 0."""
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(baseline(torch.tensor([3.0, -2.0], dtype=torch.float64), zero)) == 0.5
    assert float(baseline(torch.tensor([-3.0, 2.0], dtype=torch.float64), zero)) == 0.0


def test_hand_values():
    """rho = 2 and -1, z0 = 0.5, beta = 0.2: gains of 0.3 and 0.3."""
    policy, reference = torch.tensor([-8.0, -11.0], dtype=torch.float64), torch.full((2,), -10.0, dtype=torch.float64)
    good, z0 = torch.tensor([True, False]), torch.tensor(0.5, dtype=torch.float64)
    terms = kto_loss(policy, reference, good, z0, beta=0.2, desirable_weight=2.0, undesirable_weight=3.0)
    lost = 1 - 1 / (1 + math.exp(-0.3))
    torch.testing.assert_close(terms.losses, torch.tensor([2 * lost, 3 * lost]))
    torch.testing.assert_close(terms.rewards, torch.tensor([0.4, -0.2]))
    assert terms.baseline.item() == pytest.approx(0.1)
    assert shown(terms, policy, good) == pytest.approx(
        {
            "loss": 2.5 * lost,
            "rewards/chosen": 0.4,
            "rewards/rejected": -0.2,
            "rewards/accuracies": 1.0,
            "logps/chosen": -8.0,
            "logps/rejected": -11.0,
        },
        abs=1e-6,
    )
    # both on the wrong side
    wrong = shown(kto_loss(policy, reference, ~good, z0, beta=0.2), policy, ~good)
    assert wrong["rewards/accuracies"] == 0.0
    # weights of 1 if none are said: gains of -0.3 and -0.3
    assert wrong["loss"] == pytest.approx(1 - lost)
    # a reward that is the baseline says good of none
    both, none = torch.tensor([True, True]), torch.zeros((), dtype=torch.float64)
    assert shown(kto_loss(policy, policy, both, none, beta=0.2), policy, both)["rewards/accuracies"] == 0.0
    # a good one that is above the reference and below the baseline
    between = kto_loss(policy[:1], reference[:1], good[:1], torch.tensor(3.0, dtype=torch.float64), beta=0.2)
    assert shown(between, policy[:1], good[:1])["rewards/accuracies"] == 0.0
    # delta = 0.1: rewards of 0.4 and -0.2 are 0.3 on their side
    terms = bco_loss(policy, reference, good, mean_of(torch.tensor([0.4, -0.2])), beta=0.2)
    torch.testing.assert_close(terms.losses, torch.full((2,), math.log(1 + math.exp(-0.3))))


def test_a_running_mean_counts_every_response_alike():
    """Steps of different sizes, one empty: the mean of all at once."""
    rewards = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    running = RunningMean()
    assert running.mean == 0.0
    for part in rewards.split([1, 0, 6, 3]):
        running.add(float(part.sum()), len(part))
    assert running.mean == pytest.approx(float(rewards.mean()), abs=1e-12)
    assert running.count == 10


def test_one_response_is_a_step():
    policy, reference, mismatched, mismatched_reference = draw(2, rows=1, shift=20.0)
    for good in (torch.tensor([True]), torch.tensor([False])):
        z0 = baseline(mismatched, mismatched_reference)
        terms = kto_loss(policy, reference, good, z0, beta=0.1)
        assert terms.losses.shape == (1,)
        assert 0 < float(terms.losses) < 1
        # its own reward is the mean
        delta = mean_of(0.1 * (policy - reference))
        assert bco_loss(policy, reference, good, delta, beta=0.1).losses.item() == pytest.approx(math.log(2))


def test_long_responses_keep_their_digits():
    """float64 sums in, so that 1e-3 nats are seen beside 2000."""
    policy, reference = torch.tensor([-2000.001], dtype=torch.float64), torch.tensor([-2000.0], dtype=torch.float64)
    z0 = torch.tensor(0.0, dtype=torch.float64)
    terms = kto_loss(policy, reference, torch.tensor([True]), z0, beta=1.0)
    assert terms.rewards.item() == pytest.approx(-0.001, rel=1e-6)
    assert terms.losses.item() == pytest.approx(0.50025, abs=1e-6)


def test_far_rewards_have_no_slope_and_no_nan():
    """KTO, proposition 4.1; BCO's loss goes on with a slope of one where a response is on the wrong side."""
    policy = torch.tensor([-1e4, 1e4], dtype=torch.float64, requires_grad=True)
    zero, good = torch.zeros(2, dtype=torch.float64), torch.tensor([True, True])
    kto_loss(policy, zero, good, zero[0], beta=1.0).losses.sum().backward()
    assert torch.equal(policy.grad, zero)
    policy.grad = None
    terms = bco_loss(policy, zero, good, zero[0], beta=1.0)
    terms.losses.sum().backward()
    assert policy.grad.tolist() == [-1.0, 0.0]
    assert terms.losses.isfinite().all()
