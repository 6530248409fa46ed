"""From a handmade rollouts.parquet to a step of policy gradient: what is read, left out, weighed, divided by and written down.

The policy is a table of one distribution over the tokens, so that every figure can be worked out here.
"""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import write_table
from pipeline.config.files import load_overrides
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import TrainConfig
from pipeline.errors import CheckError, DataError
from pipeline.forward.trees import merge
from pipeline.models.identity import identify_model, weights_digest
from pipeline.progress import SILENT
from pipeline.training.checks.ratios import check_ratios, measure_ratios
from pipeline.training.inputs.open import load_inputs
from pipeline.training.inputs.rollouts import load_rollouts
from pipeline.training.objectives.advantages import advantages
from pipeline.training.objectives.measured import mean_over
from pipeline.training.step import train_step

TOKENS, LIMIT = 7, 9
GENERATOR = np.random.default_rng(0)
BEHAVIOUR, REFERENCE, POLICY = (
    values - np.log(np.exp(values).sum()) for values in GENERATOR.normal(0, [[0.6]] * 3, (3, TOKENS))
)


class OneDistribution:
    """A pass over trees in which every token has the log-probability of its number, whatever stands before it."""

    def __init__(self, logps):
        self.logits = torch.tensor(logps, dtype=torch.float64, requires_grad=True)

    def tokens(self, trees):
        return sum(len(tree) for tree in merge(trees)[0])

    def __call__(self, trees):
        logps = self.logits.log_softmax(0).float()
        return [[logps[torch.tensor(branch)] for branch in tree.branches] for tree in trees]


def sample(prompt, number, ids, reward, reason="stop", **columns):
    stored = {name: np.float32(table[list(ids)]) for name, table in (("logps", BEHAVIOUR), ("ref_logps", REFERENCE))}
    return {
        "prompt_id": f"p{prompt}",
        "sample": number,
        "prompt_ids": [1, 2, 3, prompt],
        "response_ids": list(ids),
        "finish_reason": reason,
        "reward": reward,
        **{name: values.tolist() for name, values in stored.items()},
        "logp": float(stored["logps"].sum(dtype=np.float64)),
        "ref_logp": float(stored["ref_logps"].sum(dtype=np.float64)),
    } | columns


# prompts of three, two and three samples of several lengths
SAMPLES = [
    sample(0, 0, [0, 1, 6], 1.0),
    sample(0, 1, [2, 6], 0.0),
    sample(0, 2, [3, 3, 3, 5, 4], 4.0, "length"),
    sample(1, 0, [5, 6], -1.0),
    sample(1, 1, [5, 5, 0, 6], 2.0),
    sample(2, 0, [1], 0.5, "length"),
    sample(2, 1, [1, 2, 6], 0.25),
    sample(2, 2, [6], -3.0),
]


def stored(place, samples=SAMPLES, **about):
    path = place / "rollouts.parquet"
    write_table(path, pa.Table.from_pylist(samples, schema=ROLLOUTS), {"max_tokens": LIMIT, **about})
    return path


# --- steps


def by_hand(settings, rows, policy):
    """Loss, gradient by the policy's logits and metrics of a step, sample after sample; `settings` as far as they occur below."""
    logits = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    logps, facts = logits.log_softmax(0), settings.facts
    groups = {row: [one for one in SAMPLES if one["prompt_id"] == f"p{row}"] for row in rows}
    drawn = [one for row in rows for one in groups[row]]
    counts = [one for one in drawn if not (settings.mask_truncated_completions and one["finish_reason"] == "length")]
    tokens, total, ratios, kls, low, high = sum(len(one["response_ids"]) for one in counts), 0.0, [], [], [], []
    for one in counts:
        own = groups[int(one["prompt_id"][1:])]
        rewards = np.array([other["reward"] for other in own])
        if settings.kl_coef and facts.kl == "reward":
            rewards -= settings.kl_coef * np.array([other["logp"] - other["ref_logp"] for other in own])
        advantage = float(advantages([rewards], facts.advantage)[0][one["sample"]])
        ids = torch.tensor(one["response_ids"])
        ratio = torch.exp(logps[ids] - torch.tensor(BEHAVIOUR)[ids])
        ratios += ratio.tolist()
        gap = torch.tensor(REFERENCE)[ids] - logps[ids]
        kls += (torch.exp(gap) - gap - 1).tolist()
        if facts.level == "sample":
            ratio = ratio.prod()[None]
        parts = -torch.minimum(ratio * advantage, ratio.clamp(1 - facts.clip[0], 1 + facts.clip[1]) * advantage)
        low += [float(r < 1 - facts.clip[0] and advantage < 0) for r in ratio]
        high += [float(r > 1 + facts.clip[1] and advantage > 0) for r in ratio]
        if settings.kl_coef and facts.kl == "loss":
            parts = parts + settings.kl_coef * (torch.exp(gap) - gap - 1)
        scale = {
            "tokens": 1 / tokens,
            "sample_means": 1 / len(ids) / len(drawn),
            "sample_sums": 1 / len(drawn),
            "constant": 1 / len(drawn) / LIMIT,
        }
        total = total + parts.sum() * scale[facts.aggregation]
    total.backward()
    ratios = np.array(ratios)
    return logits.grad, {
        "loss": float(total.detach()),
        "reward": np.mean([one["reward"] for one in drawn]),
        "reward_std": np.mean([np.std([one["reward"] for one in groups[row]], ddof=1) for row in rows]),
        "ratio/mean": ratios.mean(),
        "ratio/max": ratios.max(),
        "kl/behaviour": (ratios - 1 - np.log(ratios)).mean(),
        "kl": np.mean(kls),
        "clip_ratio/low_mean": np.mean(low),
        "clip_ratio/high_mean": np.mean(high),
        "clip_ratio/region_mean": np.mean(low) + np.mean(high),
    }


@pytest.mark.parametrize("masked", [False, True], ids=["", "some cut off"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2, 0]], ids=["", "one twice"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.3},
        {"kl_coef": 0.3, "kl_in": "reward"},
        {"variant": "grpo", "kl_coef": 0.3},
        {"variant": "dr_grpo", "kl_coef": 0.3},
        {"variant": "rloo", "kl_coef": 0.3, "epsilon": 0.5, "epsilon_high": 0.9},
        {"variant": "dapo", "kl_coef": 0.3, "advantage": "centred"},
    ],
    ids=str,
)
def test_a_step_is_the_formula_over_its_samples(tmp_path, settings, rows, masked):
    config = PolicyGradientConfig(**settings, mask_truncated_completions=masked)
    gradient, expected = by_hand(config, rows, POLICY)
    rollouts = load_rollouts(stored(tmp_path), config)
    for budget in (8192, 1):
        forward = OneDistribution(POLICY)
        train = TrainConfig(objective="policy_gradient", policy_gradient=config, tokens_per_batch=budget)
        values = train_step(forward, rollouts, rows, train)
        assert values == pytest.approx(expected, abs=2e-6)
        assert forward.logits.grad == pytest.approx(gradient, abs=2e-6)


def test_cases_of_the_step_are_not_trivial():
    """Tokens are clipped on both sides, ratios differ, the highest is of a sample that can be masked."""
    _, found = by_hand(PolicyGradientConfig(kl_coef=0.3), [0, 1, 2], POLICY)
    _, masked = by_hand(PolicyGradientConfig(kl_coef=0.3, mask_truncated_completions=True), [0, 1, 2], POLICY)
    assert found["clip_ratio/low_mean"] > 0.05
    assert found["clip_ratio/high_mean"] > 0.05
    assert found["ratio/max"] > masked["ratio/max"] > 1.2


@pytest.mark.parametrize(("variant", "beta"), [("apa", 0.5), ("a2po", 0.5), ("qrpo", 0.5)])
def test_a_regression_is_of_whole_log_ratios(tmp_path, variant, beta):
    config = PolicyGradientConfig(variant=variant, **({"value_temperature": 2.0} if variant == "a2po" else {}))
    total = 0.0
    for prompt in range(3):
        own = [one for one in SAMPLES if one["prompt_id"] == f"p{prompt}"]
        rewards = np.array([one["reward"] for one in own])
        for one in own:
            of_policy, reward = POLICY[one["response_ids"]].sum(), one["reward"]
            if variant == "apa":
                target = (reward - (rewards.sum() - reward) / (len(own) - 1)) / beta
                total += (of_policy - one["logp"] - target) ** 2
            elif variant == "a2po":
                value = 2.0 * np.log(np.exp(rewards / 2.0).mean())
                total += (beta * (of_policy - one["ref_logp"]) - (reward - value)) ** 2
            else:
                target = (rewards <= reward).mean() - beta * np.log(beta * (np.exp(1 / beta) - 1))
                total += (beta * (of_policy - one["ref_logp"]) - target) ** 2
    train = TrainConfig(objective="policy_gradient", policy_gradient=config, beta=beta)
    found = train_step(OneDistribution(POLICY), load_rollouts(stored(tmp_path), config), [0, 1, 2], train)
    assert found["loss"] == pytest.approx(total / len(SAMPLES), rel=1e-5)


# --- what is read


def test_what_is_read_of_the_samples(tmp_path):
    rollouts = load_rollouts(stored(tmp_path), PolicyGradientConfig())
    assert rollouts.ids == ["p0", "p1", "p2"]
    assert rollouts.starts.tolist() == [0, 3, 5, 8]
    assert rollouts.cut_off.tolist() == [one["finish_reason"] == "length" for one in SAMPLES]
    assert rollouts.sums_2S[0].tolist() == [one["logp"] for one in SAMPLES]
    assert rollouts.sums_2S[1].tolist() == [one["ref_logp"] for one in SAMPLES]
    assert (rollouts.longest, rollouts.ends, rollouts.max_tokens) == (9, {1, 4, 6}, LIMIT)
    assert rollouts.one_by_one.ids == [f"{one['prompt_id']}/{one['sample']}" for one in SAMPLES]
    assert [list(branch) for branch in rollouts.trees[1].branches] == [[5, 6], [5, 5, 0, 6]]
    assert rollouts.one_by_one.logps(4, "ref_logps").tolist() == SAMPLES[4]["ref_logps"]
    # of a file that does not say how long samples could be
    assert load_rollouts(stored(tmp_path, max_tokens=None), PolicyGradientConfig()).max_tokens == 5


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_leaves_its_sample_out(tmp_path, reward):
    changed = [{**one, "reward": reward} if number == 1 else one for number, one in enumerate(SAMPLES)]
    rollouts = load_rollouts(stored(tmp_path, changed), PolicyGradientConfig())
    assert rollouts.left_out == {"without a reward": 1}
    assert rollouts.starts.tolist() == [0, 2, 4, 7]
    assert rollouts.rewards.tolist() == [one["reward"] for number, one in enumerate(SAMPLES) if number != 1]


def test_scores_under_the_reference_may_lack_if_nothing_reads_them(tmp_path):
    without = [{**one, "ref_logps": None, "ref_logp": None} for one in SAMPLES]
    path = stored(tmp_path, without)
    assert len(load_rollouts(path, PolicyGradientConfig())) == 3
    for settings in ({"kl_coef": 0.1}, {"variant": "qrpo"}, {"variant": "a2po"}):
        with pytest.raises(DataError, match="no whole set of ref_logps"):
            load_rollouts(path, PolicyGradientConfig(**settings))


def test_a_response_without_a_token_is_told(tmp_path):
    empty = [*SAMPLES, sample(2, 3, [], 1.0)]
    with pytest.raises(DataError, match="p2 has no whole set of logps"):
        load_rollouts(stored(tmp_path, empty), PolicyGradientConfig())


def test_what_does_not_count_is_in_no_mean_be_it_no_number():
    total, count = mean_over(torch.tensor([1.5, float("nan"), float("inf")]), torch.tensor([2.0, 0.0, 0.0]))
    assert (float(total), float(count)) == (3.0, 2.0)


def test_samples_are_read_for_the_loss_that_is_asked_for(tmp_path):
    equal = [{**one, "reward": 1.0} if one["prompt_id"] == "p1" else one for one in SAMPLES]
    run = Run(tmp_path)
    stored(tmp_path, equal)
    for variant, words in (
        ("clip", "samples   6 of 2 prompts; 2 samples of equal rewards left out"),
        ("reinforce_pp", "samples   8 of 3 prompts"),
        # which of them is better is not said, but how far the policy may go
        ("clip train.policy_gradient.kl_coef=0.1", "samples   8 of 3 prompts"),
        ("rloo train.policy_gradient.kl_coef=0.1", "samples   8 of 3 prompts"),
    ):
        settings = ["train.objective=policy_gradient", *f"train.policy_gradient.variant={variant}".split()]
        config = load_overrides({"data": {"path": "x"}, "policy": {"model": "x"}}, settings)
        assert load_inputs(config, run).words == words


# --- before the first step


def test_ratios_are_measured_of_the_prompts_that_are_asked_for(tmp_path):
    rollouts = load_rollouts(stored(tmp_path), PolicyGradientConfig())
    same = measure_ratios(OneDistribution(BEHAVIOUR), rollouts, 3, "float32", TrainConfig())
    assert same["passed"]
    assert (same["samples"], same["tokens"]) == (8, 21)
    assert same["ratio_mean"] == pytest.approx(1)
    other = measure_ratios(OneDistribution(POLICY), rollouts, 2, "float32", TrainConfig())
    log_ratios = np.concatenate([(POLICY - BEHAVIOUR)[one["response_ids"]] for one in SAMPLES[:5]])
    assert not other["passed"]
    assert (other["samples"], other["tokens"]) == (5, 16)
    assert other["ratio_mean"] == pytest.approx(np.exp(log_ratios).mean(), rel=1e-5)
    assert other["ratio_max"] == pytest.approx(np.exp(log_ratios).max(), rel=1e-5)
    assert other["kl"] == pytest.approx((np.exp(log_ratios) - 1 - log_ratios).mean(), rel=1e-4)
    assert other["max_absolute_difference"] == pytest.approx(np.abs(log_ratios).max(), rel=1e-5)


def test_ratios_are_measured_in_passes_as_long_as_those_of_training(tmp_path):
    """A prompt may have more samples than a device holds at once."""
    rollouts = load_rollouts(stored(tmp_path), PolicyGradientConfig())
    found, passes = [], []

    class Noting(OneDistribution):
        def __call__(self, trees):
            passes[-1].append(self.tokens(trees))
            return super().__call__(trees)

    for budget in (None, 12):
        passes.append([])
        train = TrainConfig(tokens_per_batch=budget)
        found.append(measure_ratios(Noting(POLICY), rollouts, 3, "float32", train))
    assert found[0] == pytest.approx(found[1])
    assert max(passes[1]) <= 12 < max(passes[0])


@pytest.fixture
def checked(tmp_path, tiny_model):
    """Checks the ratios of a policy; what the gate's file says of it."""

    def check(logps, *settings, **of_writer):
        config = load_overrides(
            {"data": {"path": "x"}, "policy": {"model": str(tiny_model)}},
            ["train.objective=policy_gradient", "train.precision=float32", *settings],
        )
        rollouts = load_rollouts(stored(tmp_path), PolicyGradientConfig())
        policy = SimpleNamespace(model=SimpleNamespace(eval=lambda: None), forward=OneDistribution(logps))
        writer = {"weights_digest": weights_digest(tiny_model), "model": identify_model(tiny_model).digest}
        about = {"dtype": "float32", "policy": writer | of_writer}
        run = Run(tmp_path)
        run.gate.unlink(missing_ok=True)
        try:
            check_ratios(config, run, about, tiny_model, policy, rollouts, SILENT)
        except CheckError as error:
            return json.loads(run.gate.read_text()), str(error)
        return json.loads(run.gate.read_text()), None

    return check


def test_the_gate_is_closed_to_a_policy_that_did_not_write_what_it_should_have(checked):
    figures, said = checked(BEHAVIOUR)
    assert (figures["applies"], figures["passed"], said) == (True, True, None)
    figures, said = checked(POLICY)
    assert "the gate is closed" in said
    assert (figures["applies"], figures["passed"]) == (True, False)


def test_samples_of_another_model_are_taken_as_far_as_the_bound_lets_them(checked):
    for of_writer, reason in (
        ({"weights_digest": "another"}, "another model wrote the samples"),
        ({"model": "another"}, "not its configuration or its code"),
    ):
        for bound, refused in (("0.5", False), ("null", False), ("0.001", True)):
            figures, said = checked(POLICY, f"train.policy_gradient.max_kl={bound}", **of_writer)
            assert not figures["applies"]
            assert reason in figures["reason"]
            assert (said is not None) == refused
            if said:
                assert f"{figures['kl']:.3f} nats per token from the policy" in said
