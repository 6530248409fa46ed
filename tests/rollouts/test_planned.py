"""`refscore plan` of a training on samples: what it says is what the rollout and the training then do."""

import re

import numpy as np
import pytest

from pipeline.config.files import load_config
from pipeline.planning.forecast import disk
from pipeline.planning.outlook import examples_of_samples, outlook
from pipeline.planning.sampled import foresee
from pipeline.precompute.plan import make_plan
from pipeline.training.inputs.batches import tokens_in_a_pass
from tests.conftest import make_tiny_model, preference_rows, refscore_here, write_rows

ON_SAMPLES = "train.objective=policy_gradient"


def planned(place, *settings):
    sets = [part for setting in (ON_SAMPLES, *settings) for part in ("--set", setting)]
    return refscore_here(place.where, "plan", "--config", place.config, *sets)


@pytest.fixture
def config_of(place, monkeypatch):
    monkeypatch.chdir(place.where)
    return lambda *settings: load_config(place.config, [ON_SAMPLES, *settings])


def test_what_is_there_is_counted_before_and_after(place, config_of):
    new = foresee(config_of())
    assert (new.samples, new.made, new.missing, new.models, new.to_score) == (36, 0, 36, 1, 36)
    assert new.tokens_to_score == 3 * int(new.prompts.sum()) + 36 * 12
    place.rollout(ON_SAMPLES)
    there = foresee(config_of())
    assert (there.made, there.missing, there.to_score, there.tokens_to_score) == (36, 0, 0, 0)
    # another reference: everything is to be scored under it, nothing sampled
    other = make_tiny_model(place.where / "other", seed=1)
    moved = foresee(config_of(f"reference.model={other}"))
    assert (moved.made, moved.models, moved.to_score) == (36, 2, 36)
    assert moved.tokens_to_score == sum(
        len(row["prompt_ids"]) + len(row["response_ids"]) for row in place.rows().to_dicts()
    )
    assert moved.responses_to_score == sum(map(len, place.rows()["response_ids"]))
    # another policy: both score all
    assert foresee(config_of(f"policy.model={other}")).to_score == 72
    # fewer prompts are whole shards of those that are there; a damaged one is not
    assert foresee(config_of("rollout.prompts=8")).made == 24
    (shard, *_) = sorted((place.run() / "rollouts").glob("samples-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:8] + b"\0" * 40 + content[48:])
    assert foresee(config_of()).made == 24


def test_a_step_is_that_of_the_longest_samples_that_there_can_be(place, config_of):
    config = config_of("train.tokens_per_batch=40")
    sampled = foresee(config)
    examples = examples_of_samples(sampled, config.train, "cpu")
    assert (examples.train, examples.longest) == (12, sampled.prompts.max() + 11)
    for prompt, tokens in zip(sampled.prompts, examples.tokens, strict=True):
        beside = min(3, max(1, (40 - prompt) // 11))
        assert tokens == prompt * np.ceil(3 / beside) + 3 * 11
    assert len(set(examples.tokens - sampled.prompts)) > 1
    # with room for all, a prompt is read once
    wide = examples_of_samples(sampled, config_of("train.tokens_per_batch=4096").train, "cpu")
    assert (wide.tokens == sampled.prompts + 33).all()
    seen = outlook(config, make_plan(config), "cpu", 1, sampled)
    assert seen.tokens_per_pass == max(examples.longest, tokens_in_a_pass(config.train, "cpu"))
    assert seen.steps == 4
    assert seen.training.total > 0
    longer = foresee(config_of("generate.max_tokens=200"))
    assert outlook(config, make_plan(config), "cpu", 1, longer).training.total > seen.training.total


def test_disk_is_what_a_rollout_leaves_there(place, config_of):
    # no sample ends early, so each is as long as it can be
    long = ("generate.max_tokens=100", "generate.fixed_length=true")
    config = config_of(*long)
    sampled, plan = foresee(config), make_plan(config)
    predicted = disk(config, plan, outlook(config, plan, "cpu", 1, sampled), sampled)
    place.rollout(ON_SAMPLES, *long)
    run = place.run()
    written = sum(file.stat().st_size for file in [run / "rollouts.parquet", *run.glob("rollouts/samples-*")])
    assert written == pytest.approx(predicted.samples, rel=0.6)
    store = sum(file.stat().st_size for file in (place.where / "data/store").rglob("scores-*.parquet"))
    assert store == pytest.approx(predicted.store, rel=0.4)
    after = foresee(config)
    assert disk(config, plan, outlook(config, plan, "cpu", 1, after), after).store == 0


@pytest.mark.parametrize(
    "rows", [preference_rows(14), [{"prompt": row["prompt"]} for row in preference_rows(14)]], ids=["pairs", "prompts"]
)
def test_the_command_says_it_in_words(place, rows):
    write_rows(place.where / "preferences.jsonl", rows)
    said = planned(place)
    assert "samples   12 prompts x 3 of up to 12 tokens: 36 to make by" in said
    assert "scores    under the policy, which is the reference: 36 of 36 sequences to score" in said
    assert re.search(
        r"sampling  [\d.]+ GiB on one device \(weights .*\), up to 432 tokens, about .* at [\d.e+]+ tokens/s", said
    )
    assert re.search(
        r"training  4 steps, about [\d,]+ tokens, \d+ in a forward pass \(longest sample \d+\), about", said
    )
    assert re.search(r"scoring   .* tokens on each of 1, about", said)
    assert re.search(r"disk      .*samples 0\.\d\d\)", said)
    assert re.search(r"fits      training takes", said)
    # of pairs nothing is scored
    assert "store  " not in said
    place.rollout(ON_SAMPLES)
    again = planned(place)
    assert "36 made before under the same settings, 0 to make" in again
    assert "0 of 36 sequences to score" in again
    assert "scoring   " not in again
    assert not re.search("sampling  .*GiB", again)


def test_a_value_model_has_the_same_samples(place):
    said = planned(place, "train.objective=value")
    assert "36 to make" in said
    assert "training  memory is predicted for policies" in said


def test_prompts_without_room_are_counted(place):
    write_rows(
        place.where / "preferences.jsonl",
        [*preference_rows(6), {"prompt": "cat " * 40, "chosen": "a", "rejected": "b"}],
    )
    limit = make_tiny_model(place.where / "short", max_position_embeddings=80)
    said = planned(
        place, f"policy.model={limit}", f"reference.model={limit}", "generate.max_tokens=40", "data.eval_fraction=0"
    )
    assert "6 prompts x 3 of up to 40 tokens, 1 more leave no room for them" in said
