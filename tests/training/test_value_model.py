"""Advantages by a critic's values, and what a critic learns: equal to recursions and closed forms in float64, and to TRL's loss."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import write_table
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import TrainConfig
from pipeline.errors import DataError
from pipeline.training.inputs.rollouts import load_rollouts
from pipeline.training.objectives.advantages import generalised_advantages, token_advantages, token_returns
from pipeline.training.objectives.objective import objective_of
from tests.training.test_policy_gradient_losses import LONGEST, SAMPLES, case, ours, padded, trl_grpo

PPO = PolicyGradientConfig(variant="ppo")


def by_sums(rewards, values, gamma, lam):
    """Equation 16 of 1506.02438 as it stands: the sum of (gamma lam)^l delta_t+l, no recursion."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[at + 1] - values[at] for at, reward in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (at - start) * deltas[at] for at in range(start, len(deltas)))
        for start in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (0.7, 1.0)])
def test_generalised_advantages_are_the_papers_sum(gamma, lam):
    draw = np.random.default_rng(0)
    for length in (1, 2, 7):
        rewards, values = draw.normal(size=length), draw.normal(size=length)
        expected = by_sums(rewards, values, gamma, lam)
        assert generalised_advantages(rewards, values, gamma, lam) == pytest.approx(expected, abs=1e-12)


def test_without_values_they_are_what_is_to_come_and_with_lambda_one_the_return_less_the_value():
    draw = np.random.default_rng(1)
    rewards, values = draw.normal(size=6), draw.normal(size=6)
    to_come = np.cumsum(rewards[::-1])[::-1]
    assert generalised_advantages(rewards, np.zeros(6), 1.0, 1.0) == pytest.approx(to_come)
    assert generalised_advantages(rewards, values, 1.0, 1.0) == pytest.approx(to_come - values)
    # a perfect critic of a reward that is certain leaves nothing
    assert generalised_advantages(rewards, to_come, 1.0, 0.95) == pytest.approx(np.zeros(6), abs=1e-12)


def stored(path, groups, *, values=True, seed=0):
    """rollouts.parquet with samples of these (reward, length, finish_reason), by prompt."""
    draw = np.random.default_rng(seed)
    rows = []
    for prompt, group in enumerate(groups):
        for sample, (reward, length, reason) in enumerate(group):
            logps, ref_logps = (-draw.exponential(1.0, length).astype(np.float32) for _ in range(2))
            rows.append(
                {
                    "prompt_id": f"p{prompt}",
                    "sample": sample,
                    "prompt_ids": [5, 6, 7 + prompt],
                    "response_ids": draw.integers(5, 60, length).tolist(),
                    "finish_reason": reason,
                    "reward": reward,
                    "logps": logps,
                    "ref_logps": ref_logps,
                    "logp": float(logps.sum(dtype=np.float64)),
                    "ref_logp": float(ref_logps.sum(dtype=np.float64)),
                    "values": draw.normal(size=length).astype(np.float32) if values else None,
                }
            )
    write_table(path, pa.Table.from_pylist(rows, schema=ROLLOUTS), {"max_tokens": LONGEST})
    return rows


GROUPS = [[(1.0, 3, "stop"), (0.0, 5, "length"), (2.0, 1, "stop")], [(-1.0, 4, "stop"), (0.5, 2, "length")]]


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True], ids=["", "some cut off"])
def test_a_steps_token_advantages_are_whitened_and_those_of_the_formula(tmp_path, kl_coef, masked):
    rows = stored(tmp_path / "r.parquet", GROUPS)
    settings = PolicyGradientConfig(
        variant="ppo", kl_coef=kl_coef, gae_lambda=0.8, gae_gamma=0.9, mask_truncated_completions=masked
    )
    rollouts = load_rollouts(tmp_path / "r.parquet", settings)
    config = TrainConfig(objective="policy_gradient", policy_gradient=settings)
    step = objective_of(config).whole(rollouts, [1, 0], config)
    raw = []
    for row in rows:
        rewards = [-kl_coef * (float(a) - float(b)) for a, b in zip(row["logps"], row["ref_logps"], strict=True)]
        rewards[-1] += row["reward"]
        raw.append(np.array(by_sums(rewards, row["values"].tolist(), 0.9, 0.8)))
    counts = [not (masked and row["finish_reason"] == "length") for row in rows]
    every = np.concatenate([own for own, count in zip(raw, counts, strict=True) if count])
    for number, own in enumerate(raw):
        assert step.targets[number] == pytest.approx((own - every.mean()) / every.std(ddof=1), abs=1e-6)
        assert step.weights[number] == counts[number]
    whitened = np.concatenate([step.targets[number] for number in range(5) if counts[number]])
    assert (whitened.mean(), whitened.std(ddof=1)) == pytest.approx((0, 1), abs=1e-6)


def test_a_step_of_equal_advantages_teaches_nothing_and_divides_by_nothing(tmp_path):
    stored(tmp_path / "r.parquet", [[(1.0, 1, "stop")]])
    rollouts = load_rollouts(tmp_path / "r.parquet", PPO)
    assert [own.tolist() for own in token_advantages(rollouts, [0], np.ones(1), PPO)] == [[0.0]]
    assert all(np.isfinite(own).all() for own in token_advantages(rollouts, [0], np.zeros(1), PPO))


def test_what_a_critic_learns_is_the_reward_from_each_token_on(tmp_path):
    rows = stored(tmp_path / "r.parquet", GROUPS, values=False)
    plain = load_rollouts(tmp_path / "r.parquet", PolicyGradientConfig(), for_critic=True)
    for row, own in zip(rows, token_returns(plain, range(5), PolicyGradientConfig()), strict=True):
        assert own.tolist() == [row["reward"]] * len(row["logps"])
    settings = PolicyGradientConfig(variant="ppo", kl_coef=0.2, gae_gamma=0.9)
    for row, own in zip(rows, token_returns(plain, range(5), settings), strict=True):
        rewards = -0.2 * (row["logps"].astype(float) - row["ref_logps"].astype(float))
        rewards[-1] += row["reward"]
        assert own == pytest.approx(by_sums(rewards, [0.0] * len(rewards), 0.9, 1.0), abs=1e-6)


def test_only_samples_without_a_reward_are_left_out_of_what_is_measured_by_values(tmp_path):
    groups = [[(1.0, 2, "stop"), (1.0, 3, "stop")], [(None, 2, "stop"), (0.5, 2, "stop")], [(None, 1, "stop")]]
    stored(tmp_path / "r.parquet", groups)
    for settings, for_critic in ((PPO, False), (PPO, True), (PolicyGradientConfig(), True)):
        found = load_rollouts(tmp_path / "r.parquet", settings, for_critic=for_critic)
        assert found.left_out == {"without a reward": 2}
        assert found.rewards.tolist() == [1.0, 1.0, 0.5]
    stored(tmp_path / "r.parquet", [[(None, 2, "stop")]])
    with pytest.raises(DataError, match="no sample has a reward"):
        load_rollouts(tmp_path / "r.parquet", PPO)


def test_values_that_do_not_fit_their_tokens_are_told_by_prompt(tmp_path):
    path = tmp_path / "r.parquet"
    rows = stored(path, GROUPS)
    for spoilt in (None, rows[3]["values"][:-1], np.append(rows[3]["values"][:-1], np.float32("nan"))):
        write_table(path, pa.Table.from_pylist([*rows[:3], {**rows[3], "values": spoilt}, rows[4]], schema=ROLLOUTS))
        with pytest.raises(DataError, match="a response of prompt_id p1 has no whole set of values"):
            load_rollouts(path, PPO)
        # a critic reads none
        load_rollouts(path, PPO, for_critic=True)


def test_a_critic_reads_scores_of_the_reference_if_the_kl_is_in_the_reward(tmp_path):
    path = tmp_path / "r.parquet"
    rows = stored(path, GROUPS)
    write_table(path, pa.Table.from_pylist([{**row, "ref_logps": None} for row in rows], schema=ROLLOUTS))
    for settings in (PolicyGradientConfig(), PolicyGradientConfig(kl_coef=0.1)):
        load_rollouts(path, settings, for_critic=True)
    with pytest.raises(DataError, match="no whole set of ref_logps"):
        load_rollouts(path, PolicyGradientConfig(variant="ppo", kl_coef=0.1), for_critic=True)


@pytest.mark.parametrize("masked", [False, True], ids=["", "some cut off"])
def test_a_loss_with_advantages_of_tokens_is_trls(masked):
    pytest.importorskip("trl")
    for seed in range(4):
        lengths, policy, behaviour, reference, _, weights = case(seed, masked=masked)
        by_token = np.random.default_rng(seed).normal(size=int(lengths.sum()))
        of_case = lengths, policy, behaviour, reference, np.zeros(SAMPLES), weights
        loss, gradient, metrics = ours(PPO, of_case, by_token=by_token)
        of_trl = lengths, policy, behaviour, reference, padded(by_token, lengths), weights
        theirs, their_gradient, their_metrics = trl_grpo(of_trl, loss_type="dapo")
        assert loss == pytest.approx(theirs, abs=1e-6)
        assert gradient == pytest.approx(their_gradient, abs=1e-6)
        assert metrics["clip_ratio/region_mean"] == pytest.approx(their_metrics["clip_ratio/region_mean"], abs=1e-6)


def test_ppos_loss_is_the_papers_in_value_and_gradient():
    for seed in range(3):
        lengths, policy, behaviour, reference, _, weights = case(seed)
        by_token = np.random.default_rng(seed).normal(size=len(policy))
        leaf = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
        ratio = torch.exp(leaf - torch.tensor(behaviour))
        advantages = torch.tensor(by_token)
        expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        expected.backward()
        of_case = lengths, policy, behaviour, reference, np.zeros(SAMPLES), weights
        loss, gradient, _ = ours(PPO, of_case, by_token=by_token)
        assert loss == pytest.approx(float(expected.detach()), abs=1e-6)
        assert gradient == pytest.approx(leaf.grad.numpy(), abs=1e-6)


class Fixed:
    """A critic of given values, in place of a model's."""

    def __init__(self, values):
        self.values = torch.tensor(values, dtype=torch.float32, requires_grad=True)

    def __call__(self, trees):
        return [[part] for part in torch.split(self.values, [len(tree.branches[0]) for tree in trees])]


def test_the_critics_loss_and_what_it_explains_are_their_definitions_however_a_step_is_cut(tmp_path):
    rows = stored(tmp_path / "r.parquet", GROUPS, values=False)
    settings = PolicyGradientConfig(mask_truncated_completions=True)
    config = TrainConfig(objective="value", policy_gradient=settings)
    rollouts = load_rollouts(tmp_path / "r.parquet", settings, for_critic=True)
    objective = objective_of(config)
    whole = objective.whole(rollouts, [0, 1], config)
    examples, numbers = objective.parts(rollouts, [0, 1])
    lengths = [len(row["logps"]) for row in rows]
    values = np.random.default_rng(3).normal(size=sum(lengths))
    returns = np.repeat([row["reward"] for row in rows], lengths)
    counts = np.repeat([row["finish_reason"] == "stop" for row in rows], lengths)
    for cuts in ([numbers], [numbers[:2], numbers[2:]]):
        totals, sums, start, gradients = 0.0, {}, 0, []
        for group in cuts:
            here = sum(lengths[number] for number in group)
            critic = Fixed(values[start : start + here])
            found = objective.measured(critic, examples, group, config, whole)
            start += here
            loss = found.losses.sum() / len(numbers)
            loss.backward()
            totals += float(loss.detach())
            gradients.append(critic.values.grad)
            for name, (total, count) in found.measured.means.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + float(total), before[1] + float(count)
        errors, kept = values[counts] - returns[counts], returns[counts]
        assert totals == pytest.approx((errors**2).mean())
        expected = np.where(counts, 2 * (values - returns) / counts.sum(), 0.0)
        assert torch.cat(gradients).numpy() == pytest.approx(expected, abs=1e-6)
        means = {name: total / count for name, (total, count) in sums.items()}
        assert means["loss"] == pytest.approx(totals)
        assert means["value/mean"] == pytest.approx(values[counts].mean())
        assert means["reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
        explained = 1 - (errors**2).sum() / ((kept - kept.mean()) ** 2).sum()
        assert means["value/explained_variance"] == pytest.approx(explained)


def test_equal_returns_have_no_variance_to_explain(tmp_path):
    stored(tmp_path / "r.parquet", [[(1.0, 2, "stop"), (1.0, 3, "stop")]], values=False)
    config = TrainConfig(objective="value")
    rollouts = load_rollouts(tmp_path / "r.parquet", config.policy_gradient, for_critic=True)
    objective = objective_of(config)
    found = objective.measured(
        Fixed(np.zeros(5)), rollouts.one_by_one, [0, 1], config, objective.whole(rollouts, [0], config)
    )
    assert [float(part) for part in found.measured.means["value/explained_variance"]] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"variant": "rloo", "advantage": "gae"}, "variant rloo weighs whole samples"),
        ({"variant": "gspo", "advantage": "gae"}, "variant gspo weighs whole samples"),
        ({"variant": "topr", "advantage": "gae"}, "variant topr weighs whole samples"),
        ({"variant": "apa", "advantage": "gae"}, "variant apa weighs whole samples"),
        ({"gae_lambda": 0.5}, "gae_lambda: read with advantage=gae only"),
        ({"gae_gamma": 0.5, "critic_learning_rate": 0.1}, "critic_learning_rate, gae_gamma: read with advantage=gae"),
        ({"variant": "ppo", "advantage": "group", "gae_lambda": 0.5}, "read with advantage=gae only"),
        ({"variant": "ppo", "gae_gamma": 0.0}, "greater than 0"),
    ],
)
def test_settings_of_values_that_nothing_would_read_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        PolicyGradientConfig(**settings)


def test_any_loss_of_tokens_takes_advantages_by_values():
    for variant in ("clip", "ppo", "grpo", "dr_grpo", "dapo", "cispo", "reinforce_pp"):
        assert PolicyGradientConfig(variant=variant, advantage="gae", gae_lambda=0.9).reads_values
