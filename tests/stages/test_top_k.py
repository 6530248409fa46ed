"""`refscore score --top-k`: a teacher's likeliest tokens at every position, from both engines."""

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import experiment, preference_rows, refscore, refscore_here, write_rows

ROWS = [
    {"prompt": "How do I cook rice?", "response": "Boil it well."},
    {"prompt": "How do I cook rice?", "response": "Boil it."},
    {"prompt": "Hi " * 200, "response": "Too long."},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": "The cat sat on the mat and the dog ran."},
]


@pytest.fixture
def where(tmp_path, tiny_model):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    return tmp_path


def likeliest(where, count, command=refscore_here, *overrides):
    sets = [argument for override in overrides for argument in ("--set", override)]
    said = command(
        where, "score", "rows.jsonl", "--out", "out.parquet", "--config", "experiment.yaml", "--top-k", count, *sets
    )
    return said, pl.read_parquet(where / "out.parquet")


def must_be_true(table, model, count):
    """Against a plain forward pass: the likeliest tokens in order, with their log-probabilities."""
    for row in table.filter(pl.col("problem").is_null()).iter_rows(named=True):
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            every = model(ids).logits[0].log_softmax(1)[len(row["prompt_ids"]) - 1 : -1]
        truth = every.topk(count, dim=1)
        ours = np.array(row["top_logps"])
        assert ours.shape == (len(row["response_ids"]), count)
        np.testing.assert_allclose(ours, truth.values.numpy(), atol=1e-4)
        at_ids = every.gather(1, torch.tensor(row["top_ids"])).numpy()
        np.testing.assert_allclose(at_ids, ours, atol=1e-4)
        own = every.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(row["logps"], own, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7])
def test_transformers_names_the_likeliest(where, tiny_model, count):
    said, table = likeliest(where, count)
    assert f"the {count} likeliest tokens at every position of 3 responses" in said
    assert "1 with a problem" in said
    must_be_true(table, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), count)
    dropped = table.row(2, named=True)
    assert dropped["problem"].startswith("too_long")
    assert dropped["top_ids"] is dropped["top_logps"] is dropped["logps"] is None


@pytest.mark.engine
@pytest.mark.parametrize("count", [5, 40])
def test_vllm_names_the_likeliest_also_more_than_it_answers_by_default(where, tiny_model, count):
    _, table = likeliest(where, count, refscore, "reference.engine=vllm")
    must_be_true(table, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), count)


def test_more_tokens_than_the_model_has(where):
    said = refscore_here(
        where, "score", "rows.jsonl", "--out", "o.parquet", "--config", "experiment.yaml", "--top-k", 100000, code=2
    )
    assert "ask for 1 to" in said
    assert not (where / "o.parquet").exists()
