"""`refscore rollout` with real vLLM: what it samples is what its own scorer, and transformers, give these probabilities."""

import numpy as np
import polars as pl
import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request
from pipeline.engines.reference import open_reference
from pipeline.models.load import Named, load_tokenizer
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_in_turn, write_rows

pytestmark = pytest.mark.engine


def test_samples_have_the_probabilities_that_are_stored_with_them(tmp_path, tiny_model):
    policy = make_tiny_model(tmp_path / "policy", seed=1)
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(10))
    config = experiment(
        tmp_path,
        tiny_model,
        data,
        reference={"engine": "vllm"},
        policy={"model": str(policy)},
        rollout={"samples": 4, "prompts_per_shard": 3},
        judge=["rule:contains=e"],
        # stage three's; rollouts are drawn from the whole distribution
        generate={"max_tokens": 24, "temperature": 0.0},
    )
    command = ("rollout", "--config", config, "--run", "r")
    (code, said), (again, unchanged) = refscore_in_turn(tmp_path, command, command)
    assert (code, again) == (0, 0), said + unchanged
    assert unchanged.count("no engine is started") == 3
    rows = pl.read_parquet(tmp_path / "data/runs/r/rollouts.parquet").to_dicts()
    assert len(rows) >= 4 * 5
    requests = [Request(row["prompt_ids"], row["response_ids"]) for row in rows]
    for model, column in ((policy, "logps"), (tiny_model, "ref_logps")):
        with open_reference(ReferenceConfig(model=str(model), engine="transformers")).start(512) as scorer:
            for row, truth in zip(rows, scorer.score(requests), strict=True):
                assert np.allclose(row[column], truth, atol=1e-4)
    # a sample that ended has its end, and the samples of a prompt are not one and the same
    end = load_tokenizer(policy, Named(str(policy))).eos_token_id
    assert all((row["response_ids"][-1] == end) == (row["finish_reason"] == "stop") for row in rows)
    assert len({(row["prompt_id"], *row["response_ids"]) for row in rows}) > 0.9 * len(rows)
    # the policy finds its own samples likelier than the reference does: an estimate of a KL
    assert np.mean([row["logp"] - row["ref_logp"] for row in rows]) > 0
