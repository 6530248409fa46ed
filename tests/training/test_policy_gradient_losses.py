"""The losses of policy gradient equal TRL's, and formulas written here in float64, in value and gradient; advantages likewise."""

import math
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.config.rollouts import VARIANTS, PolicyGradientConfig
from pipeline.training.objectives.advantages import advantages, quantile_targets, soft_maximum
from pipeline.training.objectives.policy_gradient import Normalisers, SampleLogps, policy_gradient_loss

SAMPLES, LONGEST, LIMIT = 6, 9, 12


def case(seed, spread=0.4, *, masked=False):
    """Samples of several lengths: the policy's logps as leaves, what is stored, targets, weights."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, LONGEST + 1, SAMPLES)
    tokens = int(lengths.sum())
    behaviour = -generator.exponential(1.5, tokens)
    policy = behaviour + generator.normal(0, spread, tokens)
    reference = behaviour + generator.normal(0, spread, tokens)
    targets = generator.normal(0, 1.0, SAMPLES)
    weights = np.ones(SAMPLES)
    if masked:
        weights[[1, 4]] = 0
    return lengths, policy, behaviour, reference, targets, weights


def ours(settings, of_case, beta=0.1, by_token=None):
    lengths, policy, behaviour, reference, targets, weights = of_case
    leaf = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    x = SampleLogps(
        leaf,
        torch.tensor(behaviour, dtype=torch.float32),
        torch.tensor(reference, dtype=torch.float32) if settings.reads_reference else None,
        torch.repeat_interleave(torch.arange(SAMPLES), torch.tensor(lengths)),
        torch.tensor(lengths, dtype=torch.float64),
        torch.tensor(targets),
        torch.tensor(weights),
        None if by_token is None else torch.tensor(by_token),
    )
    by = Normalisers(float((lengths * weights).sum()), float(SAMPLES), float(LIMIT))
    found = policy_gradient_loss(x, settings, beta, by)
    loss = found.losses_S.sum()
    loss.backward()
    means = {name: float(total / count) for name, (total, count) in found.means.items()}
    return float(loss.detach()), leaf.grad.double().numpy(), {**means, "ratio/max": float(found.highest.detach())}


def padded(values, lengths, fill=0.0):
    table = torch.full((SAMPLES, LONGEST), fill, dtype=torch.float32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for row in range(SAMPLES):
        table[row, : lengths[row]] = torch.tensor(values[starts[row] : starts[row + 1]], dtype=torch.float32)
    return table


class Accelerator:
    num_processes = 1

    def reduce(self, values, reduction):
        return values

    def gather(self, values):
        return values

    gather_for_metrics = gather


def trl_grpo(of_case, **settings):
    """Loss and gradient by the method of TRL's GRPOTrainer, which is given the policy's logps."""
    from trl import GRPOTrainer

    lengths, policy, behaviour, reference, targets, weights = of_case
    leaf = padded(policy, lengths).requires_grad_()
    mask = torch.tensor([[float(at < length) for at in range(LONGEST)] for length in lengths])
    mask = mask * torch.tensor(weights, dtype=torch.float32)[:, None]
    chosen = {
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.2,
        "level": "token",
        "delta": None,
    } | settings
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.ones_like(leaf), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=Accelerator(),
        args=SimpleNamespace(delta=chosen["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=chosen["beta"],
        current_gradient_accumulation_steps=1,
        epsilon_high=chosen["epsilon_high"],
        epsilon_low=chosen["epsilon"],
        importance_sampling_level=chosen["level"],
        loss_type=chosen["loss_type"],
        max_completion_length=LIMIT,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(SAMPLES, 1, dtype=torch.long),
        "prompt_mask": torch.ones(SAMPLES, 1),
        "completion_ids": torch.zeros(SAMPLES, LONGEST, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.as_tensor(targets, dtype=torch.float32),
        "old_per_token_logps": padded(behaviour, lengths),
        "ref_per_token_logps": padded(reference, lengths),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(self, None, inputs)
    loss.backward()
    flat = torch.cat([leaf.grad[row, : lengths[row]] for row in range(SAMPLES)])
    metrics = {name: values[-1] for name, values in self._metrics["train"].items()}
    return float(loss.detach()), flat.double().numpy(), metrics


AS_TRL = {
    "grpo": ({"variant": "grpo"}, {}),
    "grpo, KL": ({"variant": "grpo", "kl_coef": 0.3}, {"beta": 0.3}),
    "grpo, two bounds": ({"variant": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}, {"epsilon": 0.1, "epsilon_high": 0.3}),
    "grpo, delta": ({"variant": "grpo", "delta": 1.5}, {"delta": 1.5}),
    "dapo": ({"variant": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, KL": ({"variant": "dapo", "kl_coef": 0.3}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.3}),
    "clip": ({"variant": "clip"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"variant": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dr_grpo, KL": ({"variant": "dr_grpo", "kl_coef": 0.3}, {"loss_type": "dr_grpo", "beta": 0.3}),
    "gspo": ({"variant": "gspo", "epsilon": 0.1, "epsilon_high": 0.2},
             {"level": "sequence", "epsilon": 0.1, "epsilon_high": 0.2}),
    "gspo, its bounds": ({"variant": "gspo"}, {"level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
    # TRL's epsilon_high of cispo is the bound of the ratio itself
    "cispo": ({"variant": "cispo", "epsilon_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
    "cispo, its bound": ({"variant": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "reinforce_pp": ({"variant": "reinforce_pp"}, {"loss_type": "dapo"}),
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["", "some cut off"])
@pytest.mark.parametrize("name", AS_TRL)
def test_losses_gradients_and_clipped_shares_are_those_of_trl(name, masked):
    pytest.importorskip("trl")
    settings, of_trl = AS_TRL[name]
    for seed in range(4):
        of_case = case(seed, masked=masked)
        loss, gradient, metrics = ours(PolicyGradientConfig(**settings), of_case)
        theirs, their_gradient, their_metrics = trl_grpo(of_case, **of_trl)
        assert loss == pytest.approx(theirs, abs=1e-6)
        assert gradient == pytest.approx(their_gradient, abs=1e-6)
        if settings["variant"] not in ("cispo", "gspo"):
            for share in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
                assert metrics[share] == pytest.approx(their_metrics[share], abs=1e-6)
        if settings.get("kl_coef"):
            assert metrics["kl"] == pytest.approx(their_metrics["kl"], abs=1e-6)


def test_rloo_is_trls():
    pytest.importorskip("trl")
    from trl import RLOOTrainer

    for seed in range(4):
        of_case = case(seed, spread=0.1)
        lengths, policy, behaviour, _, targets, _ = of_case
        leaf = padded(policy, lengths).requires_grad_()
        mask = torch.tensor([[float(at < length) for at in range(LONGEST)] for length in lengths])
        self = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, leaf=leaf, **__: (leaf, torch.ones_like(leaf), None),
            _metrics={"train": defaultdict(list)},
            accelerator=Accelerator(),
            aux_loss_enabled=False,
            epsilon_high=0.2,
            epsilon_low=0.2,
            model=SimpleNamespace(training=True),
        )
        inputs = {
            "prompt_ids": torch.zeros(SAMPLES, 1, dtype=torch.long),
            "prompt_mask": torch.ones(SAMPLES, 1),
            "completion_ids": torch.zeros(SAMPLES, LONGEST, dtype=torch.long),
            "completion_mask": mask,
            "old_logps": (padded(behaviour, lengths) * mask).sum(1),
            "advantages": torch.tensor(targets, dtype=torch.float32),
        }
        theirs = RLOOTrainer._compute_loss(self, None, inputs)
        theirs.backward()
        loss, gradient, metrics = ours(PolicyGradientConfig(variant="rloo"), of_case)
        flat = torch.cat([leaf.grad[row, : lengths[row]] for row in range(SAMPLES)])
        assert loss == pytest.approx(float(theirs.detach()), abs=1e-6)
        assert gradient == pytest.approx(flat.double().numpy(), abs=1e-6)
        their_shares = self._metrics["train"]
        assert metrics["clip_ratio/region_mean"] == pytest.approx(their_shares["clip_ratio/region_mean"][-1], abs=1e-6)


def test_a2po_is_trls():
    pytest.importorskip("trl.experimental.a2po")
    from trl.experimental.a2po import A2POTrainer

    of_case = case(7)
    lengths, policy, _, reference, targets, _ = of_case
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sums = [torch.tensor([values[a:b].sum() for a, b in pairwise(starts)]) for values in (policy, reference)]
    inputs = {
        "ref_logps": sums[1],
        "rewards": torch.tensor(targets),
        "v_star": torch.zeros(SAMPLES, dtype=torch.float64),
        **dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep")),
    }
    self = SimpleNamespace(
        _get_sequence_logps=lambda *_, **__: sums[0],
        args=SimpleNamespace(beta2=0.2),
        accelerator=Accelerator(),
        _metrics={"train": defaultdict(list)},
        model=SimpleNamespace(training=True),
    )
    theirs = float(A2POTrainer.compute_loss(self, SimpleNamespace(training=True), inputs))
    loss, _, _ = ours(PolicyGradientConfig(variant="a2po"), of_case, beta=0.2)
    assert loss == pytest.approx(theirs, abs=1e-6)


def by_the_papers(settings, of_case, beta):
    """Every variant's loss from its paper's formula, sample by sample, in float64."""
    lengths, policy, behaviour, reference, targets, weights = of_case
    leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    behaviour, reference = torch.tensor(behaviour), torch.tensor(reference)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    facts, total = settings.facts, torch.zeros((), dtype=torch.float64)
    all_tokens = sum(int(length) for length, weight in zip(lengths, weights, strict=True) if weight)
    for number in range(SAMPLES):
        if not weights[number]:
            continue
        here = slice(starts[number], starts[number + 1])
        pi, mu, ref, A = leaf[here], behaviour[here], reference[here], float(targets[number])
        variant, parts = settings.variant, None
        if variant in ("qrpo", "a2po"):
            loss = (beta * (pi - ref).sum() - A) ** 2
        elif variant == "apa":
            loss = ((pi - mu).sum() - A) ** 2
        elif variant == "topr":
            weight = 1.0 if A >= 0 else min(1.0, math.exp(float((pi - mu).sum().detach())))
            loss = -weight * A * pi.sum()
        elif variant in ("rloo", "gspo"):
            ratio = torch.exp((pi - mu).sum() if variant == "rloo" else (pi - mu).mean())
            low, high = facts.clip
            loss = -torch.minimum(ratio * A, torch.clamp(ratio, 1 - low, 1 + high) * A)
        else:
            parts = []
            for token in range(len(pi)):
                ratio = torch.exp(pi[token] - mu[token])
                low, high = facts.clip
                if variant == "cispo":
                    parts.append(-min(float(ratio.detach()), 1 + high) * A * pi[token])
                else:
                    parts.append(-torch.minimum(ratio * A, torch.clamp(ratio, 1 - low, 1 + high) * A))
            parts = torch.stack(parts)
        if settings.kl_coef and facts.kl == "loss":
            kl = settings.kl_coef * (torch.exp(ref - pi) - (ref - pi) - 1)
            if parts is None:
                loss = loss + (kl.mean() if facts.aggregation == "sample_means" else kl.sum())
            else:
                parts = parts + kl
        if parts is None:
            total = total + loss / SAMPLES
        elif facts.aggregation == "tokens":
            total = total + parts.sum() / all_tokens
        elif facts.aggregation == "sample_means":
            total = total + parts.mean() / SAMPLES
        else:
            total = total + parts.sum() / (SAMPLES * LIMIT)
    total.backward()
    return float(total.detach()), leaf.grad.numpy()


@pytest.mark.parametrize("masked", [False, True], ids=["", "some cut off"])
@pytest.mark.parametrize(
    ("variant", "kl_coef"),
    # those without an advantage hold the reference by themselves
    [(name, coef) for name, facts in VARIANTS.items() for coef in (0.0, 0.2) if facts.advantage or not coef],
)
def test_every_variant_is_its_papers_formula_in_value_and_gradient(variant, kl_coef, masked):
    settings = PolicyGradientConfig(variant=variant, kl_coef=kl_coef, **({"kl_in": "loss"} if kl_coef else {}))
    for seed in range(3):
        of_case = case(seed, spread=0.15, masked=masked)
        loss, gradient, _ = ours(settings, of_case, beta=0.3)
        expected, expected_gradient = by_the_papers(settings, of_case, beta=0.3)
        assert loss == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert gradient == pytest.approx(expected_gradient, abs=1e-6, rel=1e-5)


def test_a_policy_that_has_not_moved_has_ratio_one_and_the_gradient_of_reinforce():
    lengths, _, behaviour, reference, targets, weights = case(3)
    still = lengths, behaviour, behaviour, reference, targets, weights
    expected = -np.repeat(targets, lengths) / lengths.sum()
    for variant in ("clip", "dapo", "cispo", "reinforce_pp"):
        _, gradient, metrics = ours(PolicyGradientConfig(variant=variant), still)
        assert gradient == pytest.approx(expected, abs=1e-7)
        assert (metrics["ratio/mean"], metrics["ratio/max"], metrics["kl/behaviour"]) == (1, 1, 0)
        assert metrics["clip_ratio/region_mean"] == 0


def test_what_is_measured_of_a_policy_that_moved():
    lengths, policy, behaviour, reference, targets, weights = case(5, masked=True)
    counted = np.repeat(weights, lengths) > 0
    _, _, metrics = ours(PolicyGradientConfig(kl_coef=0.1), (lengths, policy, behaviour, reference, targets, weights))
    ratios = np.exp(policy - behaviour)[counted]
    assert metrics["ratio/mean"] == pytest.approx(ratios.mean(), rel=1e-5)
    assert metrics["ratio/max"] == pytest.approx(ratios.max(), rel=1e-5)
    assert metrics["kl/behaviour"] == pytest.approx((ratios - 1 - np.log(ratios)).mean(), rel=1e-4)
    back = np.exp(reference - policy)[counted]
    assert metrics["kl"] == pytest.approx((back - 1 - np.log(back)).mean(), rel=1e-4)


def test_advantages_are_their_definitions():
    groups = [np.array([1.0, 2.0, 6.0]), np.array([0.0, 4.0])]
    leave_one_out = advantages(groups, "leave_one_out")
    assert leave_one_out[0].tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]
    assert leave_one_out[1].tolist() == [-4, 4]
    assert advantages(groups, "centred")[0].tolist() == [-2, -1, 3]
    group = advantages(groups, "group")
    assert group[0] == pytest.approx(np.array([-2, -1, 3]) / (np.std([1, 2, 6], ddof=1) + 1e-4))
    every = np.array([1.0, 2, 6, 0, 4])
    batch = advantages(groups, "batch")
    assert np.concatenate(batch) == pytest.approx((every - every.mean()) / (every.std(ddof=1) + 1e-4))
    # a step whose rewards are all equal teaches nothing, and divides by nothing
    assert all((own == 0).all() for kind in ("batch", "group") for own in advantages([np.ones(3)], kind))


def test_quantile_targets_make_exp_of_reward_by_beta_one_in_the_mean():
    rewards = np.random.default_rng(0).normal(size=4000)
    for beta in (0.3, 1.0):
        targets = quantile_targets(rewards, beta)
        assert np.exp(targets / beta).mean() == pytest.approx(1.0, abs=2e-3)
    # beta log Z is near 1 + beta log beta if beta is small, where exp(1 / beta) is no float
    assert quantile_targets(np.array([1.0, 2.0]), 1e-4)[1] == pytest.approx(1 - (1 + 1e-4 * math.log(1e-4)))
    assert quantile_targets(np.array([5.0, 5.0]), 1.0) == pytest.approx([1 - math.log(math.e - 1)] * 2)


def test_the_soft_maximum_lies_between_mean_and_maximum():
    rewards = np.array([0.0, 1.0, 800.0])
    assert soft_maximum(rewards, 1.0) == pytest.approx(800 - math.log(3))
    assert soft_maximum(np.array([0.0, 1.0]), 1e6) == pytest.approx(0.5, abs=1e-5)
    assert soft_maximum(np.array([0.0, 1.0]), 0.5) == pytest.approx(0.5 * math.log((1 + math.e**2) / 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "topr", "epsilon": 0.1}, "clips no ratio and does not read epsilon"),
        ({"variant": "cispo", "delta": 3.0}, "does not read delta"),
        ({"variant": "qrpo", "advantage": "centred"}, "has no advantage"),
        ({"variant": "qrpo", "kl_coef": 0.1}, "does not read kl_coef"),
        ({"kl_in": "loss"}, "with a kl_coef alone"),
        ({"value_temperature": 1.0}, "variant a2po only"),
        ({"variant": "trpo"}, "Input should be"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        PolicyGradientConfig(**settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_does_not_count_may_have_run_away(variant):
    """No number of times infinity is nothing: a sample that was cut off and is a hundred nats away leaves loss and gradient as they were."""
    kl = {} if VARIANTS[variant].advantage is None else {"kl_coef": 0.1, "kl_in": "loss"}
    settings = PolicyGradientConfig(variant=variant, **kl)
    lengths, policy, *others = case(2, masked=True)
    first, second = int(lengths[0]), int(lengths[0] + lengths[1])
    away = policy.copy()
    away[first:second] += 120.0
    before, after = ours(settings, (lengths, policy, *others)), ours(settings, (lengths, away, *others))
    assert after[0] == before[0]
    assert np.isfinite(after[1]).all()
    assert after[1] == pytest.approx(before[1])
    assert after[2] == before[2]
