"""SIGKILL at named moments of `refscore rollout`: at most one shard is lost, and what comes out is what comes out undisturbed."""

import os

import numpy as np
import polars as pl
import pytest
from transformers import AutoModelForSequenceClassification

from tests.conftest import experiment, make_tiny_tokenizer, preference_rows, write_rows
from tests.forked import run

# samples and rewards are counted in files, which outlive the process; it kills itself at the n-th call that has the text
CHILD = """
import importlib, os, signal, sys
from pathlib import Path
import pytest
import pipeline.engines.vllm.generator, pipeline.rollouts.critics, pipeline.rollouts.rewards
from pipeline.engines.transformers import TransformersScorer
from tests.engines import sampling
patch = pytest.MonkeyPatch()
sampling.sample_here(patch, [])

def counting(owner, name, file, size):
    inner = getattr(owner, name)
    def counted(*given):
        made = inner(*given)
        with open(file, "a") as lines:
            lines.write(f"{size(*given)}\\n")
        return made
    setattr(owner, name, counted)

counting(sampling, "_sampled", "generated", lambda *_: 1)
counting(pipeline.rollouts.rewards, "score_responses", "rewarded", lambda _, groups: sum(map(len, groups)))
counting(TransformersScorer, "score", "scored", lambda _, sequences: len(sequences))
counting(pipeline.rollouts.critics.CriticPass, "__call__", "valued", lambda _, sequences: len(sequences))

module, name, text, number = sys.argv[1:5]
sys.argv = ["refscore", *sys.argv[5:]]
if module != "never":
    owner = importlib.import_module(module)
    inner, seen = getattr(owner, name), []
    def deadly(*given, **named):
        if any(text in str(one) for one in given):
            seen.append(1)
            if len(seen) == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(*given, **named)
    setattr(owner, name, deadly)
from stages.cli import main
main()
"""
FLUSH = ("pipeline.artifacts.durable", "flush")
# how many calls with the text there are before the one that is never made
EVERYTHING = bool(os.environ.get("REFSCORE_FAULTS"))
MOMENTS = {
    "generating": ("tests.engines.sampling", "_sampled", "", "17"),
    "writing samples": (*FLUSH, "-samples-", "2"),
    "writing rewards": (*FLUSH, "-rewards-", "3"),
    "publishing scores": ("pipeline.artifacts.durable", "reached", "publish: written", "2"),
    "writing the table": (*FLUSH, "-rollouts.parquet", "1"),
}
PROMPTS, SAMPLES, PER_SHARD = 12, 3, 4


def rollout(where, *moment):
    """Run the command in a process of its own; its exit code and what it said."""
    done = run(where, CHILD, *(moment or ("never",) * 4), "rollout", "--config", "experiment.yaml", "--run", "r")
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def counted(where):
    """How many samples were generated, rewarded and scored, all processes together."""
    files = [where / name for name in ("generated", "rewarded", "scored")]
    return [sum(map(int, file.read_text().split())) if file.exists() else 0 for file in files]


def prepare(where, model, **more):
    data = write_rows(where / "preferences.jsonl", preference_rows(14))
    settings = {"samples": SAMPLES, "prompts_per_shard": PER_SHARD, **more}
    experiment(where, model, data, rollout=settings, generate={"max_tokens": 12}, judge=["rule:contains=dog"])
    return where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model):
    where = prepare(tmp_path_factory.mktemp("whole"), tiny_model)
    code, said = rollout(where)
    assert code == 0, said
    assert counted(where) == [PROMPTS * SAMPLES] * 3
    return pl.read_parquet(where / "data/runs/r/rollouts.parquet")


def seldom(moment, always):
    """Each starts commands anew, which take long."""
    if not EVERYTHING and moment != always:
        pytest.skip("make faults kills at every moment")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_loses_one_shard_at_most(tmp_path, tiny_model, undisturbed, moment):
    seldom(moment, "writing samples")
    where = prepare(tmp_path, tiny_model)
    code, said = rollout(where, *MOMENTS[moment])
    assert code == -9, said
    assert not (where / "data/runs/r/rollouts.parquet").exists()
    before = counted(where)
    code, said = rollout(where)
    assert code == 0, said
    after = counted(where)
    for made, again in zip(before, after, strict=True):
        assert made <= PROMPTS * SAMPLES <= again <= (PROMPTS + PER_SHARD) * SAMPLES
    assert sum(after) <= 3 * PROMPTS * SAMPLES + PER_SHARD * SAMPLES
    rows = pl.read_parquet(where / "data/runs/r/rollouts.parquet")
    lists = ["logps", "ref_logps"]
    assert rows.drop(*lists, "logp", "ref_logp").equals(undisturbed.drop(*lists, "logp", "ref_logp"))
    for name in lists:
        for mine, theirs in zip(rows[name], undisturbed[name], strict=True):
            assert np.allclose(mine, theirs, atol=1e-4)
    # what was half written is gone
    assert not list((where / "data/runs").rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("moment", "lost"), {"reading": 0, "writing values": PER_SHARD, "writing the table": 0}.items()
)
def test_a_kill_while_a_critic_reads_loses_one_shard_of_values_at_most(tmp_path, tiny_model, moment, lost):
    seldom(moment, "writing values")
    where = prepare(tmp_path, tiny_model)
    assert rollout(where)[0] == 0
    before = pl.read_parquet(where / "data/runs/r/rollouts.parquet")
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(where / "critic")
    make_tiny_tokenizer().save_pretrained(where / "critic")
    prepare(where, tiny_model, critic="critic")
    moments = {
        "reading": ("pipeline.rollouts.critics", "batches", "", "2"),
        "writing values": (*FLUSH, "-values-", "2"),
    }
    code, said = rollout(where, *(moments | MOMENTS)[moment])
    assert code == -9, said
    # what was there is as it was
    assert pl.read_parquet(where / "data/runs/r/rollouts.parquet").equals(before)
    code, said = rollout(where)
    assert code == 0, said
    assert counted(where) == [PROMPTS * SAMPLES] * 3
    assert sum(map(int, (where / "valued").read_text().split())) == (PROMPTS + lost) * SAMPLES
    rows = pl.read_parquet(where / "data/runs/r/rollouts.parquet")
    assert rows["values"].null_count() == 0
    assert rows.drop("values").equals(before.drop("values"))
    assert not list((where / "data/runs").rglob(".tmp-*"))
