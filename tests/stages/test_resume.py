"""Interrupted and resumed equals uninterrupted, bit for bit; a kill loses at most the shard being written."""

import re
import signal

import polars as pl
import pytest
from safetensors.torch import load_file

from tests import forked
from tests.conftest import experiment, preference_rows, refscore_here, write_rows

SETTLED = pl.exclude("step_seconds", "tokens_per_second", "peak_memory_gib")


@pytest.fixture
def config(tmp_path, tiny_model):
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(24))
    train = {"max_steps": 8, "save_steps": 2, "eval_steps": 3, "save_total_limit": 2, "precision": "bfloat16"}
    return experiment(tmp_path, tiny_model, data, train=train)


def test_the_same_configuration_gives_the_same_metrics_and_resuming_changes_no_bit(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "whole")
    refscore_here(tmp_path, "train", "--config", config, "--run", "whole")
    refscore_here(tmp_path, "train", "--config", config, "--run", "again")
    killed_after(tmp_path, config, "killed", step=5)
    kept = sorted(path.name for path in (tmp_path / "data/runs/killed/checkpoints").glob("step_*"))
    assert kept[-1] == "step_000004"
    # the newest checkpoint is damaged, so the one before it is taken
    weights = tmp_path / "data/runs/killed/checkpoints/step_000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "killed")
    assert "passed over" in said
    assert "resuming after step 2" in said
    frames = {
        name: pl.read_parquet(tmp_path / f"data/runs/{name}/metrics.parquet").select(SETTLED)
        for name in ("whole", "again", "killed")
    }
    assert frames["whole"].equals(frames["again"])
    assert frames["whole"].equals(frames["killed"])
    files = [(tmp_path / f"data/runs/{name}/policy_logps.parquet").read_bytes() for name in frames]
    assert files == [files[0]] * 3
    models = [
        load_file(tmp_path / f"data/runs/{name}/model/model.safetensors") for name in ("whole", "again", "killed")
    ]
    for name, tensor in models[0].items():
        assert all(bool((tensor == other[name]).all()) for other in models[1:])
    assert len(list((tmp_path / "data/runs/whole/checkpoints").iterdir())) == 2


def test_resuming_with_dropout_changes_no_bit(tmp_path, tiny_model):
    """Dropout goes on where it was: the random state is part of a checkpoint."""
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(24))
    train = {"max_steps": 6, "save_steps": 2, "eval_steps": 0, "learning_rate": 0.01}
    policy = {"lora": {"r": 4, "alpha": 32, "dropout": 0.5}}
    config = experiment(tmp_path, tiny_model, data, train=train, policy=policy)
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "whole")
    refscore_here(tmp_path, "train", "--config", config, "--run", "whole")
    killed_after(tmp_path, config, "killed", step=3)
    assert "resuming after step 2" in refscore_here(tmp_path, "train", "--config", config, "--run", "killed")
    whole, killed = (
        (
            pl.read_parquet(tmp_path / f"data/runs/{name}/metrics.parquet").select(SETTLED),
            load_file(tmp_path / f"data/runs/{name}/adapter/adapter_model.safetensors"),
        )
        for name in ("whole", "killed")
    )
    assert whole[0].equals(killed[0])
    assert all(bool((tensor == killed[1][name]).all()) for name, tensor in whole[1].items())


def killed_after(where, config, run, step):
    """Start training and send SIGKILL once the line of `step` was printed."""
    child = forked.run(where, PATCHED.format(step=step), "train", "--config", config, "--run", run)
    assert child.returncode == -signal.SIGKILL, child.stdout + child.stderr


PATCHED = """
import os, signal, sys
from pipeline.training import loop
from stages.cli import main
inner = loop.accumulate
count = 0
def counting(*args):
    global count
    count += 1
    if count == {step} + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
loop.accumulate = counting
main()
"""

SCORING = """
import os, signal, sys, time
import pipeline.engines.transformers as engine
from stages.cli import main
inner = engine.TransformersScorer.score
count = 0
def counting(self, sequences):
    global count
    count += 1
    if count == 4:
        {action}
    return inner(self, sequences)
engine.TransformersScorer.score = counting
main()
"""


@pytest.mark.parametrize(
    "action", ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"]
)
def test_interrupted_scoring_goes_on_where_the_last_shard_ended(tmp_path, config, action):
    options = ["precompute", "--config", str(config), "--set", "reference.tokens_per_shard=300"]
    child = forked.run(tmp_path, SCORING.format(action=action), *options)
    assert "Traceback" not in child.stdout + child.stderr
    if "SIGINT" in action:
        assert child.returncode == 1
        assert "the same command goes on from there" in child.stderr
    else:
        assert child.returncode == -signal.SIGKILL
    shards = list(tmp_path.glob("data/store/*/scores-*.parquet"))
    # beside the shard in the engine a kill may lose the one that is being published
    assert len(shards) in ((3,) if "SIGINT" in action else (2, 3))
    published = pl.read_parquet(shards).height
    said = refscore_here(tmp_path, *options)
    hits, misses = map(int, re.search(r"(\d+) hits, (\d+) misses", said).groups())
    assert (hits, hits + misses) == (published, 48)
    assert "0 misses" in refscore_here(tmp_path, *options)
