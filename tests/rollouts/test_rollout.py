"""`refscore rollout` with a double that samples: counts in are counts out, and what was made before is used again."""

import json
import shutil
from itertools import groupby

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import pipeline.judges.reward_model
import pipeline.rollouts.write
import tests.engines.sampling
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import ROLLOUTS, SAMPLES
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.config.experiment import ReferenceConfig
from pipeline.config.files import load_config
from pipeline.engines import protocol
from pipeline.engines.protocol import Request
from pipeline.engines.reference import open_reference
from pipeline.engines.transformers import TransformersScorer
from pipeline.errors import ConfigError
from pipeline.judges.judging import by_reward
from pipeline.rollouts.current import ensure_rollouts
from pipeline.store.local_places import LocalPlace
from pipeline.store.registrations import registered
from pipeline.store.store import Store
from tests.conftest import make_tiny_model, make_tiny_tokenizer, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here


def test_every_sample_is_a_row_with_its_reward_and_both_scores(place):
    said = place.rollout()
    rows = read_table(place.run() / "rollouts.parquet", ROLLOUTS).to_pylist()
    assert [row["sample"] for row in rows] == [0, 1, 2] * 12
    assert all(len(list(group)) == 3 for _, group in groupby(rows, key=lambda row: row["prompt_id"]))
    for row in rows:
        assert row["reward"] == float("dog" in row["response"])
        assert row["finish_reason"] == ("length" if len(row["response_ids"]) == 12 else "stop")
        assert len(row["logps"]) == len(row["ref_logps"]) == len(row["response_ids"])
        assert row["logp"] == pytest.approx(sum(row["logps"]), abs=1e-3)
    counts = place.about()["counts"]
    assert (counts["generated"], counts["samples"], counts["prompts"]) == (36, 36, 12)
    assert counts["cut_off"] == sum(row["finish_reason"] == "length" for row in rows) > 0
    assert place.provenance()["mean_reward"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert place.provenance()["generate"]["tokens"] == sum(len(row["response_ids"]) for row in rows)
    assert "12 of the training split, 3 samples each" in said
    assert f"{counts['equal_rewards']} prompts whose samples all have the same reward" in said


def test_a_policy_that_is_the_reference_is_scored_once_and_its_samples_are_read_together(place):
    place.rollout()
    assert place.about()["policy_id"] == place.about()["reference_id"]
    assert len(place.scored) == 3
    assert sum(map(len, place.scored)) == 36
    for part in place.scored:
        # the samples of a prompt stand side by side
        assert len([prompt for prompt, _ in groupby(part, key=lambda one: list(one.prompt_ids))]) == 4
    rows = place.rows()
    assert rows["logp"].equals(rows["ref_logp"].alias("logp"))


def test_another_policy_is_scored_under_itself_and_the_reference(place):
    other = make_tiny_model(place.where / "other", seed=1)
    place.rollout(f"policy.model={other}")
    about, row = place.about(), place.rows().row(0, named=True)
    assert about["policy"]["weights_digest"] != about["weights_digest"]
    assert [told[0] for told in place.told] == ["other"]
    request = Request(row["prompt_ids"], row["response_ids"])
    for model, column in ((other, "logps"), (about["inputs"]["reference"]["model"], "ref_logps")):
        with open_reference(ReferenceConfig(model=str(model), engine="transformers")).start(len(request)) as scorer:
            (truth,) = scorer.score([request])
        assert np.allclose(row[column], truth, atol=1e-4)
    assert place.provenance()["kl"] == pytest.approx((place.rows()["logp"] - place.rows()["ref_logp"]).mean())


def test_a_second_time_nothing_is_made(place):
    place.rollout()
    before, costs = place.rows(), place.provenance()["generate"]
    said = place.rollout()
    assert (place.told, place.scored) == ([], [])
    assert said.count("no engine is started") == 2
    assert place.rows().equals(before)
    # what it took is what it took the first time
    assert place.provenance()["generate"] == costs
    assert costs["seconds"] > 0


def test_after_an_update_of_the_engine_scores_that_were_adopted_are_not_made_again(place, monkeypatch):
    monkeypatch.setattr(protocol, "engine_version", lambda _: "4.0")
    refscore_here(place.where, "precompute", "--config", place.config, "--run", "old")
    said = place.rollout()
    assert "adopted" not in said
    assert (place.provenance()["computed_by"], "computed_by" in place.about()) == ({}, False)
    before, old, key = place.rows(), place.about()["reference_id"], place.about()["key"]
    sequences = sum(map(len, place.scored))
    monkeypatch.setattr(protocol, "engine_version", lambda _: "5.0")
    refscore_here(place.where, "store", "adopt", old, "--config", place.config)
    plan = (
        "plan",
        "--config",
        place.config,
        "--json",
        "--set",
        "train.objective=policy_gradient",
        "--scoring-speed",
        1,
    )
    said = refscore_here(place.where, *plan, "--training-speed", 1)
    assert f"0 of 36 sequences to score, {sequences} adopted from {old[:12]}, up to 0 tokens" in said
    foreseen = json.loads(said[said.index("\n{") :])
    assert (foreseen["adopted"], foreseen["misses"]) == ({old: sequences}, 0)
    said = place.rollout()
    assert f"adopted   {sequences} scores that an earlier reference computed" in said
    assert "no engine is started" in said
    assert (place.told, place.scored) == ([], [])
    assert place.about()["reference_id"] != old
    assert place.rows().equals(before)
    assert place.provenance()["computed_by"] == place.about()["computed_by"] == {old: sequences}
    assert place.about()["key"] != key
    # and once more, from the store
    assert "adopted" not in place.rollout()
    assert place.about()["computed_by"] == {old: sequences}


def test_what_was_not_adopted_of_a_shard_is_scored(place, monkeypatch):
    monkeypatch.setattr(protocol, "engine_version", lambda _: "4.0")
    refscore_here(place.where, "precompute", "--config", place.config, "--run", "old")
    place.rollout("rollout.prompts=6")
    old, known = place.about()["reference_id"], sum(map(len, place.scored))
    monkeypatch.setattr(protocol, "engine_version", lambda _: "5.0")
    refscore_here(place.where, "store", "adopt", old, "--config", place.config)
    place.rollout("rollout.prompts=8")
    of_all = {request_key(one) for one in place.scored for one in one}
    assert place.about()["computed_by"] == {old: known}
    assert len(of_all) + known == len(
        {(tuple(r["prompt_ids"]), tuple(r["response_ids"])) for r in place.rows().to_dicts()}
    )


def request_key(request):
    return tuple(request.prompt_ids), tuple(request.response_ids)


def test_another_run_uses_what_the_first_made_and_stands_alone_then(place):
    place.rollout()
    place.rollout(run="second")
    assert (place.told, place.scored) == ([], [])
    assert place.rows("second").equals(place.rows())
    shutil.rmtree(place.run())
    place.rollout(run="second")
    assert place.told == []


def test_another_judge_generates_and_scores_nothing(place):
    place.rollout()
    first = place.rows()
    said = place.rollout("rollout.judge=rule:no_repetition")
    assert (place.told, place.scored) == ([], [])
    assert "rewarded by rule:no_repetition" in said
    second = place.rows()
    assert not second["reward"].equals(first["reward"])
    assert second.drop("reward").equals(first.drop("reward"))
    assert "rewards   rule:contains=dog: all given before" in place.rollout()
    assert place.rows().equals(first)


def test_more_prompts_make_only_theirs(place):
    place.rollout("rollout.prompts=8")
    assert len(place.rows()) == 24
    place.rollout()
    assert sum(map(len, place.scored)) == 12
    assert len(place.rows()) == 36


def test_how_many_prompts_a_shard_has_changes_no_sample(place):
    place.rollout()
    before = place.rows().drop("logps", "ref_logps", "logp", "ref_logp")
    place.rollout("rollout.prompts_per_shard=5")
    assert place.rows().drop("logps", "ref_logps", "logp", "ref_logp").equals(before)
    assert len(list((place.run() / "rollouts").glob("samples-*"))) == 3 + 3


def test_samples_are_drawn_from_the_whole_distribution_whatever_stage_three_is_asked_for(place):
    place.rollout()
    before = place.rows()
    place.rollout("generate.temperature=0.2", "generate.top_p=0.5", "generate.samples=2", "generate.seed=3")
    assert place.told == []
    assert place.rows().equals(before)


@pytest.mark.parametrize("part", ["samples", "rewards"])
def test_a_shard_that_is_damaged_is_made_again(place, part):
    place.rollout()
    before = place.rows()
    (shard, *_) = sorted((place.run() / "rollouts").glob(f"{part}-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + b"\0" * 40 + content[len(content) // 2 + 40 :])
    said = place.rollout()
    assert place.rows().equals(before)
    assert ("24 made before" in said) == (part == "samples")


# --- rewards


def judged(monkeypatch, reward):
    monkeypatch.setattr(pipeline.rollouts.write, "open_judge", lambda settings, _: by_reward(settings.shown, reward))


def test_rewards_that_are_no_numbers_and_those_of_a_judge_that_fails_are_null_and_counted(place, monkeypatch):
    strange = [float("nan"), float("inf"), None]

    def reward(items):
        # every prompt's first three, its samples
        return [strange[at % 3] if at < 3 else float(at % 3) for at, _ in enumerate(items)]

    judged(monkeypatch, reward)
    said = place.rollout("rollout.prompts_per_shard=100")
    rows, counts = place.rows(), place.about()["counts"]
    assert rows["reward"].to_list() == [None] * 3 + [0.0, 1.0, 2.0] * 11
    assert (counts["samples"], counts["judge_failed"], counts["rewards_not_finite"]) == (36, 3, 2)
    assert counts["equal_rewards"] == 0
    assert place.provenance()["mean_reward"] == pytest.approx(1.0)
    assert "3 without one" in said


def test_a_judge_that_failed_is_asked_again_about_that_shard(place, monkeypatch):
    asked = []

    def reward(items):
        asked.append(len(items))
        return [None if len(asked) == 2 and at == 5 else 1.0 * at for at, _ in enumerate(items)]

    judged(monkeypatch, reward)
    place.rollout()
    assert place.about()["counts"]["judge_failed"] == 1
    asked[:] = [0, 0, 0]
    place.rollout()
    assert asked[3:] == [12]
    assert place.about()["counts"]["judge_failed"] == 0


def test_rewards_of_another_run_are_not_taken_for_samples_that_say_something_else(place):
    """As engines that batch otherwise write: the key says what was asked for, not what came."""
    place.rollout("rollout.prompts=4")
    shutil.copytree(place.run() / "rollouts", place.run("s") / "rollouts")
    (samples,) = (place.run("s") / "rollouts").glob("samples-*.parquet")
    table = read_table(samples, SAMPLES)
    others = table.to_pylist()
    for row, other in zip(others, table.to_pylist()[::-1], strict=True):
        row |= {name: other[name] for name in ("response", "response_ids", "finish_reason", "tokens")}
    write_table(samples, pa.Table.from_pylist(others, schema=SAMPLES), read_about(samples))
    place.rollout("rollout.prompts=4", run="s")
    assert place.told == []
    rows = place.rows("s")
    assert rows["reward"].to_list() == [float("dog" in text) for text in rows["response"]]
    assert rows["reward"].to_list() != place.rows()["reward"].to_list()


def test_a_judge_that_gives_no_reward_at_all_is_said(place, monkeypatch):
    judged(monkeypatch, lambda items: [None for _ in items])
    said = place.rollout(code=4)
    assert "gave none of 36 samples a reward" in said
    assert not (place.run() / "rollouts.parquet").exists()


def test_prompts_whose_samples_have_equal_rewards_are_counted(place, monkeypatch):
    def reward(items):
        # of one prompt all are the same, of another two of three
        same = {"number 3?": 1, "number 5?": 2}
        among = [next((every for name, every in same.items() if name in one.prompt.text), 3) for one in items]
        return [float(at % every) for at, every in enumerate(among)]

    judged(monkeypatch, reward)
    said = place.rollout()
    assert place.about()["counts"]["equal_rewards"] == 1
    assert "equal     1 prompts" in said


def test_a_judge_of_duels_gives_the_mean_of_the_duels_in_the_group(place):
    judge = "panel:[rule:contains=dog, rule:contains=dog]"
    place.rollout(f"rollout.judge='{judge}'")
    for group in place.rows().partition_by("prompt_id"):
        has = ["dog" in text for text in group["response"]]
        expected = [
            np.mean([0.5 + 0.5 * (mine - other) for at, other in enumerate(has) if at != me])
            for me, mine in enumerate(has)
        ]
        assert group["reward"].to_list() == pytest.approx(expected)


def test_a_judge_of_duels_needs_two_samples_and_says_so_before_any_is_made(place):
    said = place.rollout("rollout.judge='panel:[rule:contains=dog, rule:contains=dog]'", "rollout.samples=1", code=2)
    assert "rollout.samples=1 makes one of each: take two or more" in said
    assert place.told == []
    place.rollout("rollout.samples=1")


def test_a_reward_model_is_loaded_once_for_all_shards_and_its_weights_name_its_rewards(place, monkeypatch, tiny_model):
    loads = []
    inner = pipeline.judges.reward_model.with_transformers
    monkeypatch.setattr(
        pipeline.judges.reward_model, "with_transformers", lambda *given: loads.append(len(given[2])) or inner(*given)
    )
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    judge = f"judge=[{{name: 'reward_model:{place.where / 'judge'}', engine: transformers}}]"
    rewards = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(place.where / "judge")
        make_tiny_tokenizer().save_pretrained(place.where / "judge")
        if seed:
            with pytest.raises(ConfigError, match=r"rewarded by judge reward_model:.* or by what it was before"):
                ensure_rollouts(load_config(place.config, [judge]), Run(place.run()))
        place.rollout(judge)
        assert (len(place.told) == 0) == bool(seed)
        rewards.append(place.rows()["reward"].to_list())
    # samples that are equal are read once
    assert len(loads) == 2
    assert len(set(rewards[0])) > 12
    assert not set(rewards[0]) & set(rewards[1])


def test_without_a_judge_of_texts_nothing_begins(place):
    assert "no judge of texts is configured" in place.rollout("judge=implicit", code=2)
    assert place.told == []


# --- what is left out


def test_samples_without_a_token_are_left_out_and_counted(place, monkeypatch):
    inner, seen = tests.engines.sampling._sampled, []

    def sampled(*asked):
        seen.append(1)
        made = inner(*asked)
        # all samples of the first prompt, and one of the second
        if len(seen) in (1, 2, 3, 5):
            made.outputs[0].token_ids = []
        return made

    monkeypatch.setattr(tests.engines.sampling, "_sampled", sampled)
    said = place.rollout()
    counts = place.about()["counts"]
    assert (counts["generated"], counts["samples"], counts["empty"], counts["without_samples"]) == (36, 32, 4, 1)
    assert len(place.rows()) == 32
    assert place.rows()["sample"].to_list()[:2] == [0, 2]
    assert "left out  4 samples without a token" in said
    assert "left out  1 prompts without any sample" in said


def test_samples_whose_scores_are_not_finite_are_left_out_and_counted(place, monkeypatch):
    inner, spoilt = TransformersScorer.score, []

    def score(scorer, sequences):
        scores = inner(scorer, sequences)
        spoilt.extend([sequences[1]] if not spoilt else [])
        return [
            np.full_like(one, -np.inf) if item == spoilt[0] else one
            for item, one in zip(sequences, scores, strict=True)
        ]

    monkeypatch.setattr(TransformersScorer, "score", score)
    said = place.rollout()
    counts = place.about()["counts"]
    assert counts["generated"] == counts["samples"] + counts["not_finite"] == 36
    assert counts["not_finite"] == 1
    assert spoilt[0].response_ids not in place.rows()["response_ids"].to_list()
    assert "left out  1 samples whose scores are not finite" in said


def test_prompts_that_leave_no_room_for_a_response_get_no_samples_and_are_counted(place):
    rows = preference_rows(14)
    rows[0]["prompt"] = rows[0]["prompt"] + " rice" * 330
    write_rows(place.where / "preferences.jsonl", rows)
    said = place.rollout("data.max_length=512", "data.eval_fraction=0", "generate.max_tokens=200")
    counts = place.about()["counts"]
    assert (counts["prompts"], counts["too_long"], counts["without_samples"]) == (14, 1, 1)
    assert counts["generated"] == counts["samples"] == 39
    assert "left out  1 prompts that leave no room for generate.max_tokens" in said
    said = place.rollout("data.max_length=512", "data.eval_fraction=0", "generate.max_tokens=511", code=2)
    assert "none of 14 prompts leaves room for a response" in said


def test_another_vocabulary_is_refused(place):
    other = make_tiny_model(place.where / "words")
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["ZZZ"])
    tokenizer.save_pretrained(other)
    assert "has another vocabulary than" in place.rollout(f"policy.model={other}", code=2)
    assert place.told == []


def test_a_store_that_cannot_be_written_is_said_and_needed_only_for_what_it_lacks(place, monkeypatch):
    monkeypatch.setattr(Store, "why_not_writable", lambda _: "read-only")
    assert "the store cannot be written (read-only)" in place.rollout(code=1)
    monkeypatch.undo()
    sample_here(monkeypatch, place.told)
    place.rollout()
    monkeypatch.setattr(Store, "why_not_writable", lambda _: "read-only")
    place.rollout()


def test_the_store_knows_that_the_run_uses_the_scores_of_both_models(place):
    other = make_tiny_model(place.where / "other", seed=1)
    for run in ("r", "second"):
        place.rollout(f"policy.model={other}", run=run)
    about = place.about()
    for identity in (about["policy_id"], about["reference_id"]):
        held = LocalPlace(place.where / "data/store" / identity)
        assert {one.name for one in registered(held, held.entries())} == {"r", "second"}


def test_the_run_is_listed_and_shown(place):
    place.rollout()
    said = refscore_here(place.where, "list")
    assert "rollouts" in said
    said = refscore_here(place.where, "show", place.run() / "rollouts.parquet")
    assert "rule:contains=dog" in said
    assert "response_ids (length)" in said


def test_held_out_prompts_are_there_for_stage_three(place):
    place.rollout("train.objective=policy_gradient")
    pairs = pl.read_parquet(place.run() / "pairs.parquet")
    assert set(pairs["split"]) == {"train", "eval"}
    assert not set(pairs.filter(pl.col("split") == "eval")["prompt"]) & set(place.rows()["prompt"])


def test_a_place_that_cannot_be_made_is_said_before_anything_is_sampled(place):
    place.run().mkdir(parents=True)
    (place.run() / "rollouts").write_text("a file")
    assert "rollouts cannot be made" in place.rollout(code=1)
    assert place.told == []
