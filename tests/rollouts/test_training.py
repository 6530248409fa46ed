"""From samples with rewards to a policy: steps are the same however they are cut, resumed ones too, and bad samples are told."""

import json
import shutil

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.training.save
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.rollouts import PolicyGradientConfig
from pipeline.config.training import TrainConfig
from pipeline.errors import DataError
from pipeline.forward.logps import forward_of
from pipeline.forward.trees import width_of
from pipeline.training.inputs.batches import micro_batches
from pipeline.training.inputs.rollouts import load_rollouts
from pipeline.training.objectives.objective import objective_of
from pipeline.training.step import train_step
from tests.conftest import make_tiny_model, refscore_here
from tests.rollouts.conftest import Place

TRAIN = (
    "train.objective=policy_gradient", "train.learning_rate=0.001", "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=1", "train.max_steps=6", "train.save_steps=2", "train.report_to=[]",
    "train.precision=float32", "train.policy_gradient.max_kl=null",
)  # fmt: skip


def length_rewards(table):
    """Longer samples are better: a reward that differs within a prompt, as the rules of these few words hardly do."""
    return table.set_column(
        table.schema.get_field_index("reward"),
        "reward",
        pa.array([float(len(ids)) for ids in table["response_ids"].to_pylist()]),
    )


@pytest.fixture
def sampled(place: Place):
    """A run with samples; `rewrite` puts other rows in their place, saying of themselves what the old ones did."""
    place.rollout()
    path = place.run() / "rollouts.parquet"

    def rewrite(change):
        about = read_about(path)
        write_table(path, change(read_table(path, ROLLOUTS)), about)

    place.rewrite = rewrite
    rewrite(length_rewards)
    return place


def train(place, *settings, run="r", code=0):
    sets = [part for setting in (*TRAIN, *settings) for part in ("--set", setting)]
    return refscore_here(place.where, "train", "--config", place.config, "--run", run, *sets, code=code)


def metrics(place, run="r"):
    return pl.read_parquet(place.run(run) / "metrics.parquet")


def weights(place, run="r"):
    return dict(AutoModelForCausalLM.from_pretrained(place.run(run) / "model").named_parameters())


def copied(place, name):
    """The run's samples under another name."""
    place.run(name).mkdir(parents=True)
    shutil.copy(place.run() / "rollouts.parquet", place.run(name))


def test_a_policy_learns_what_is_rewarded_and_says_how_far_it_moved(sampled):
    said = train(sampled)
    assert "gate      passed" in said
    assert "mean ratio 1.00000" in said
    assert "steps of 4 prompts" in said
    found = metrics(sampled)
    assert found["ratio/mean"][0] == pytest.approx(1.0, abs=1e-4)
    assert found["kl/behaviour"][0] == pytest.approx(0, abs=1e-5)
    assert found["kl/behaviour"][-1] > found["kl/behaviour"][0]
    assert found["reward_std"].min() > 0
    assert found["rewards/margins"].null_count() == len(found)
    gate = json.loads((sampled.run() / "gate.json").read_text())
    assert gate["passed"]
    assert gate["ratio_max"] == pytest.approx(1, abs=1e-3)
    # what was rewarded more became likelier, measured apart from the loss
    rollouts = load_rollouts(sampled.run() / "rollouts.parquet", PolicyGradientConfig())
    model = AutoModelForCausalLM.from_pretrained(sampled.run() / "model").eval()
    gains = []
    with torch.no_grad():
        for row in range(len(rollouts)):
            found_logps = forward_of(model, "separate")([rollouts.trees[row]])[0]
            gained = np.array([float(own.sum()) for own in found_logps]) - rollouts.sums_2S[0, rollouts.of(row)]
            rewards = rollouts.rewards[rollouts.of(row)]
            gains.append(float((gained * (rewards - rewards.mean())).sum()))
    assert np.mean(gains) > 0
    card = (sampled.run() / "model/README.md").read_text()
    assert "trained by policy gradient on" in card
    assert "- policy-gradient" in card
    assert "samples per prompt" in card


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("variant", ["clip", "gspo", "reinforce_pp", "qrpo"])
def test_a_step_is_the_same_however_many_forward_passes_it_takes(sampled, tiny_model, layout, variant):
    settings = PolicyGradientConfig(variant=variant)
    rollouts = load_rollouts(sampled.run() / "rollouts.parquet", settings)
    found, passes = [], set()
    for budget in (None, 80, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        config = TrainConfig(objective="policy_gradient", policy_gradient=settings, tokens_per_batch=budget, beta=0.5)
        forward = forward_of(model, layout)
        parts = objective_of(config).parts(rollouts, range(5))
        passes.add(len(list(micro_batches(forward, *parts, config))))
        values = train_step(forward, rollouts, range(5), config)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        found.append({**values, "norm": float(norm)})
    assert min(passes) == 1
    assert max(passes) == len(parts[1])
    assert found[0]["norm"] > 1e-3
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=2e-5, rel=1e-4)


def test_a_resumed_training_is_the_one_that_was_not_interrupted(sampled):
    copied(sampled, "whole")
    train(sampled, "train.save_total_limit=3", run="whole")
    train(sampled, "train.save_total_limit=3")
    # as if it had been stopped after the first checkpoint
    shutil.rmtree(sampled.run() / "model")
    (sampled.run() / "provenance.json").unlink()
    for checkpoint in sorted((sampled.run() / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    assert "resuming after step 2" in train(sampled, "train.save_total_limit=3")
    for name, weight in weights(sampled).items():
        assert torch.equal(weight, weights(sampled, "whole")[name]), name


def test_what_was_saved_is_compared_on_samples_and_not_on_whole_groups(sampled, monkeypatch):
    """A prompt may have more samples than a device holds at once."""
    read, inner = [], pipeline.training.save.outputs_of
    monkeypatch.setattr(
        pipeline.training.save,
        "outputs_of",
        lambda model, trees, *rest: read.append(trees) or inner(model, trees, *rest),
    )
    train(sampled)
    assert [[len(tree.branches) for tree in trees] for trees in read] == [[1, 1, 1, 1]] * 2


def test_another_loss_on_the_same_samples_makes_nothing_anew(sampled, monkeypatch):
    train(sampled)
    monkeypatch.setattr("pipeline.engines.vllm.generator.generator", None)
    monkeypatch.setattr("pipeline.engines.start.start_scorer", None)
    for number, setting in enumerate(("epsilon=0.1", "variant=topr", "advantage=group", "kl_coef=0.1")):
        copied(sampled, f"again-{number}")
        assert "gate      passed" in train(sampled, f"train.policy_gradient.{setting}", run=f"again-{number}")
    assert metrics(sampled, "again-3")["kl"].null_count() == 0
    assert metrics(sampled)["kl"].null_count() == len(metrics(sampled))


def test_the_training_ends_when_the_samples_have_become_those_of_another_model(sampled):
    said = train(sampled, "train.policy_gradient.max_kl=0.0001", "train.learning_rate=0.01")
    assert "ended     after step" in said
    assert "nats per token from the model that wrote the samples" in said
    found = metrics(sampled)
    assert found["kl/behaviour"][-1] > 0.0001 >= found["kl/behaviour"][-2]
    steps = json.loads((sampled.run() / "provenance.json").read_text())["stages"]["train"]["steps"]
    assert steps == found["step"][-1] < 6
    assert "nothing to train" in train(sampled, "train.policy_gradient.max_kl=0.0001", "train.learning_rate=0.01")


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_training_that_had_ended_by_itself_takes_no_more_steps(sampled, logging_steps):
    settings = "train.learning_rate=0.01", f"train.logging_steps={logging_steps}"
    copied(sampled, "looked")
    train(sampled, "train.learning_rate=0.01", "train.max_steps=2", run="looked")
    # so that the mean of two steps, which is logged, is below
    bound = f"train.policy_gradient.max_kl={metrics(sampled, 'looked')['kl/behaviour'][1] * 0.9}"
    assert "ended     after step 2 of 6" in train(sampled, *settings, bound)
    # killed before it could say so
    (sampled.run() / "provenance.json").unlink()
    assert "resuming after step 2" in train(sampled, *settings, bound)
    assert metrics(sampled)["step"][-1] == 2


def test_what_is_logged_of_several_steps_is_their_mean_and_the_highest_ratio(sampled):
    copied(sampled, "each")
    train(sampled, "train.logging_steps=1", run="each")
    train(sampled, "train.logging_steps=3")
    each, some = metrics(sampled, "each"), metrics(sampled)
    assert some["step"].to_list() == [3, 6]
    for row, steps in enumerate((each[:3], each[3:])):
        for name in ("loss", "reward", "kl/behaviour", "ratio/mean", "clip_ratio/region_mean"):
            assert some[name][row] == pytest.approx(steps[name].mean(), rel=1e-9)
        assert some["ratio/max"][row] == steps["ratio/max"].max() > steps["ratio/max"].min()


def test_a_step_whose_samples_were_all_cut_off_is_said_and_teaches_nothing(sampled):
    def cut_off_of(prompts):
        def change(table):
            names = sorted(set(table["prompt_id"].to_pylist()))[:prompts]
            reasons = ["length" if name in names else "stop" for name in table["prompt_id"].to_pylist()]
            field = ROLLOUTS.field("finish_reason")
            return table.set_column(table.schema.get_field_index(field.name), field, pa.array(reasons, field.type))

        return change

    # one prompt in a step: of ten, six are seen
    settings = "train.policy_gradient.mask_truncated_completions=true", "train.per_device_train_batch_size=1"
    sampled.rewrite(cut_off_of(5))
    said = train(sampled, *settings)
    assert "nothing to learn from: all samples were cut off" in said
    assert "moved 0." in said
    found = metrics(sampled)
    none = found["kl/behaviour"].is_null()
    assert 0 < none.sum() < 6
    assert found["loss"].filter(none).to_list() == found["grad_norm"].filter(none).to_list() == [0.0] * none.sum()
    assert found["grad_norm"].filter(~none).min() > 0
    sampled.rewrite(cut_off_of(100))
    copied(sampled, "all")
    said = train(sampled, *settings, run="all", code=3)
    assert "samples were cut off, and train.policy_gradient.mask_truncated_completions lets those teach nothing" in said


def test_samples_of_another_model_close_no_gate_and_are_refused_if_they_are_far(sampled, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=5)
    said = train(sampled, f"policy.model={other}", code=2)
    assert "was made with other settings (policy.model" in said

    def scored_by_another(table):
        values = [np.array(logps) - 0.4 for logps in table["logps"].to_pylist()]
        table = table.set_column(
            table.schema.get_field_index("logps"),
            ROLLOUTS.field("logps"),
            pa.array(values, ROLLOUTS.field("logps").type),
        )
        sums = pa.array([float(np.float32(value).sum(dtype=np.float64)) for value in values])
        return table.set_column(table.schema.get_field_index("logp"), ROLLOUTS.field("logp"), sums)

    sampled.rewrite(scored_by_another)
    said = train(sampled, code=4)
    assert "the gate is closed" in said
    assert "every ratio must be 1" in said
    assert not (sampled.run() / "model").exists()
    path = sampled.run() / "rollouts.parquet"
    about = read_about(path)
    write_table(path, read_table(path, ROLLOUTS), about | {"policy": about["policy"] | {"weights_digest": "another"}})
    said = train(sampled, "train.policy_gradient.max_kl=0.02", code=4)
    assert "another model wrote the samples, and it is 0.0" in said
    assert "gate      does not apply (another model wrote the samples)" in train(sampled)


def rewards_of(values):
    return lambda table: table.set_column(
        table.schema.get_field_index("reward"), "reward", pa.array(values(table), pa.float64())
    )


def test_what_teaches_nothing_is_counted(sampled):
    count = len(sampled.rows())

    def some(table):
        rewards = [float(number) for number in range(len(table))]
        rewards[0:3] = [1.0, 1.0, 1.0]
        rewards[3:6] = [None, None, 5.0]
        rewards[6] = None
        return rewards

    sampled.rewrite(rewards_of(some))
    rollouts = load_rollouts(sampled.run() / "rollouts.parquet", PolicyGradientConfig())
    assert rollouts.left_out == {"without a reward": 3, "alone with a reward": 1, "of equal rewards": 3}
    assert len(rollouts.rewards) == count - 7
    said = train(sampled)
    assert (
        "3 samples without a reward left out; 1 samples alone with a reward left out; 3 samples of equal rewards left out"
        in said
    )
    # advantages over the step can use equal rewards
    assert (
        "of equal rewards"
        not in load_rollouts(sampled.run() / "rollouts.parquet", PolicyGradientConfig(variant="reinforce_pp")).left_out
    )


@pytest.mark.parametrize("value", [None, float("nan"), 2.0], ids=["no reward", "no number", "all equal"])
def test_rewards_that_teach_nothing_at_all_are_a_sentence(sampled, value):
    sampled.rewrite(rewards_of(lambda table: [value] * len(table)))
    said = train(sampled, code=3)
    assert "no prompt has samples that differ in reward" in said
    assert "another judge" in said


def test_damaged_samples_are_told_by_prompt(sampled):
    path = sampled.run() / "rollouts.parquet"
    whole = read_table(path, ROLLOUTS)

    def spoiled(column, value, row=2):
        rows = whole.to_pylist()
        rows[row][column] = value(rows[row][column])
        write_table(path, pa.Table.from_pylist(rows, schema=ROLLOUTS))
        return path

    for column, value in (
        ("logps", lambda old: old[:-1]),
        ("logps", lambda old: [float("nan"), *old[1:]]),
        ("logps", lambda old: None),
        ("logp", lambda old: old + 0.5),
    ):
        with pytest.raises(DataError, match="no whole set of logps"):
            load_rollouts(spoiled(column, value), PolicyGradientConfig())
    with pytest.raises(DataError, match="no whole set of ref_logps"):
        load_rollouts(spoiled("ref_logps", lambda old: old[:-1]), PolicyGradientConfig(kl_coef=0.1))
    load_rollouts(path, PolicyGradientConfig())
    write_table(path, pa.concat_tables([whole.slice(1), whole.slice(0, 1)]))
    with pytest.raises(DataError, match="do not stand together"):
        load_rollouts(path, PolicyGradientConfig())


def test_prompts_are_whole_however_the_file_is_cut(sampled, monkeypatch):
    path = sampled.run() / "rollouts.parquet"
    expected = load_rollouts(path, PolicyGradientConfig())
    monkeypatch.setattr("pipeline.artifacts.tables._AT_ONCE", 2)
    found = load_rollouts(path, PolicyGradientConfig())
    assert found.ids == expected.ids
    assert found.starts.tolist() == expected.starts.tolist()
    assert list(found.trees) == list(expected.trees)
    assert found.sums_2S.tolist() == expected.sums_2S.tolist()
    assert (found.longest, found.ends) == (expected.longest, expected.ends)


def test_eight_samples_read_their_prompt_once(place, tiny_model):
    place.rollout("rollout.samples=8")
    path = place.run() / "rollouts.parquet"
    write_table(path, length_rewards(read_table(path, ROLLOUTS)), read_about(path))
    rollouts = load_rollouts(path, PolicyGradientConfig())
    of_prompt, responses = rollouts.trees[0].trunk, set(map(tuple, rollouts.trees[0].branches))
    assert len(rollouts.of(0)) == 8
    # the last token of a response predicts nothing
    inner = sum(len(response) - 1 for response in responses)
    expected = {"tree": len(of_prompt) + inner, "separate": len(responses) * len(of_prompt) + inner}
    assert expected["separate"] > 2 * expected["tree"]
    for layout, tokens in expected.items():
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        forward = forward_of(model, layout)
        config = TrainConfig(objective="policy_gradient", tokens_per_batch=8192)
        examples, numbers = objective_of(config).parts(rollouts, [0])
        assert forward.tokens([examples.trees[number] for number in numbers]) == tokens
        read = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, given, __, read=read: read.append(given[0].numel())
        )
        train_step(forward, rollouts, [0], config)
        assert read == [width_of(tokens, torch.device("cpu"))]


def test_a_variant_of_the_references_samples_wants_them(sampled, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=5)
    setting = f"policy.model={other}"
    sampled.rollout(setting, run="moved")
    path = sampled.run("moved") / "rollouts.parquet"
    write_table(path, length_rewards(read_table(path, ROLLOUTS)), read_about(path))
    said = train(sampled, setting, "train.policy_gradient.variant=qrpo", run="moved", code=2)
    assert "were written by another model: make it the reference" in said
    assert "gate      passed" in train(sampled, setting, run="moved")


def test_without_samples_the_way_out_is_said(place):
    assert "run 'refscore rollout' with the same configuration and run first" in train(place, code=2)


def test_samples_that_were_cut_off_can_be_kept_from_teaching(sampled):
    said = train(sampled, "train.policy_gradient.mask_truncated_completions=true")
    assert "gate      passed" in said
    rows = sampled.rows()
    assert (rows["finish_reason"] == "length").any()
    rollouts = load_rollouts(sampled.run() / "rollouts.parquet", PolicyGradientConfig())
    config = TrainConfig(
        objective="policy_gradient", policy_gradient=PolicyGradientConfig(mask_truncated_completions=True)
    )
    whole = objective_of(config).whole(rollouts, range(len(rollouts)), config)
    for number, cut_off in enumerate(rollouts.cut_off.tolist()):
        assert whole.weights[number] == (0.0 if cut_off else 1.0)
    lengths = [len(tree.branches[0]) for tree in rollouts.one_by_one.trees]
    assert whole.normalisers.tokens == sum(
        length for length, cut_off in zip(lengths, rollouts.cut_off, strict=True) if not cut_off
    )


def test_other_rewards_of_the_same_settings_are_another_training(sampled):
    train(sampled)
    path = sampled.run() / "rollouts.parquet"
    write_table(path, read_table(path, ROLLOUTS), read_about(path) | {"key": "other samples"})
    said = train(sampled, code=2)
    assert (
        "already holds a training with other settings (the samples or their rewards, or the policy's weights)" in said
    )
