"""Experiments without a reference, sick trainings, and reward models, through the command line."""

import json

import numpy as np
import polars as pl
import pytest

from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.forked import run


@pytest.fixture
def config(tmp_path, tiny_model):
    return experiment(tmp_path, tiny_model, write_rows(tmp_path / "preferences.jsonl", preference_rows(24)))


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo", "sft"])
def test_reference_free_losses_skip_stage_one(tmp_path, config, loss):
    options = ["--config", config, "--run", loss, "--set", f"train.loss_type={loss}"]
    said = refscore_here(tmp_path, "precompute", *options)
    assert f"nothing to score: {loss} compares nothing with the reference" in said
    assert not list((tmp_path / "data").rglob("scores-*.parquet"))
    said = refscore_here(tmp_path, "train", *options)
    assert "gate      does not apply: nothing is compared" in said
    pairs = pl.read_parquet(tmp_path / f"data/runs/{loss}/pairs.parquet")
    assert pairs["ref_chosen_token_logps"].null_count() == len(pairs) > 0
    losses = pl.read_parquet(tmp_path / f"data/runs/{loss}/metrics.parquet")["eval_loss"].drop_nulls()
    assert losses[-1] < losses[0]
    # pairs without scores do not pass for pairs with scores
    said = refscore_here(tmp_path, "train", "--config", config, "--run", loss, "--restart", code=2)
    assert "have no stored score" in said


def test_pairs_with_scores_serve_reference_free_losses_too(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "r", "--set", "train.loss_type=simpo")
    assert "nothing to score" not in said
    assert pl.read_parquet(tmp_path / "data/runs/r/pairs.parquet")["ref_chosen_token_logps"].null_count() == 0


def test_a_training_that_is_not_finite_stops_and_keeps_its_pairs(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    wild = [
        "--set",
        "train.learning_rate=1e30",
        "--set",
        "train.lr_scheduler_type=constant",
        "--set",
        "train.warmup_ratio=0",
    ]
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "r", *wild, code=4)
    assert "training stops before it spoils the weights" in said
    kept = json.loads((tmp_path / "data/runs/r/not_finite.json").read_text())
    known = pl.read_parquet(tmp_path / "data/runs/r/pairs.parquet")["pair_id"].to_list()
    assert kept["step"] == 2
    assert len(kept["pair_ids"]) == 4
    assert set(kept["pair_ids"]) <= set(known)
    # what was measured before is there
    metrics = pl.read_parquet(tmp_path / "data/runs/r/metrics.parquet")
    assert np.isfinite(metrics["loss"].drop_nulls().to_numpy()).all()


def test_a_sick_run_is_named_in_the_log_and_kept(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    still = ["--set", "train.learning_rate=1e-12", "--set", "train.max_steps=10"]
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "r", *still)
    assert "health    The loss stays at ln 2" in said
    assert "stays at ln 2" in json.loads((tmp_path / "data/runs/r/health.json").read_text())["words"][0]


CLASSIFY = """
import json, sys
from vllm import LLM, PoolingParams
model = LLM(sys.argv[1], runner="pooling", dtype="float32", max_model_len=256, enforce_eager=True)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
found = model.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
print("SCORES", json.dumps([output.outputs.probs[0] for output in found]))
"""


@pytest.mark.engine
def test_a_reward_model_is_trained_and_vllm_reads_its_scores(tmp_path, config):
    import torch
    from transformers import AutoModelForSequenceClassification

    options = ["--config", config, "--run", "reward", "--set", "train.objective=reward", "--set", "train.max_steps=12"]
    said = refscore_here(tmp_path, "train", *options)
    assert "nothing to score: the reward model" in said
    metrics = pl.read_parquet(tmp_path / "data/runs/reward/metrics.parquet")
    assert metrics["eval_rewards/accuracies"].drop_nulls()[-1] > 0.9
    assert metrics["logps/chosen"].null_count() == len(metrics)
    directory = tmp_path / "data/runs/reward/model"
    pairs = pl.read_parquet(tmp_path / "data/runs/reward/pairs.parquet").head(3).to_dicts()
    sequences = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs for side in ("chosen", "rejected")]
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = run(tmp_path, CLASSIFY, directory, json.dumps(sequences), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SCORES"))[7:])
    assert scores == pytest.approx(expected, abs=1e-4)
    assert min(expected[::2]) > max(expected[1::2])
