"""`refscore score`: any responses, through the same store as the pairs."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engines.protocol import Request
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.engines.sequences import plain_logps

ROWS = [
    {"prompt": "How do I cook rice?", "response": "Boil it."},
    {"prompt": "How do I cook rice?", "response": "Boil it."},
    {"prompt": [{"role": "user", "content": "Hi"}], "response": [{"role": "assistant", "content": "The cat sat."}]},
    {"prompt": "How do I cook rice?", "response": ""},
    {"prompt": "Hi " * 200, "response": "Too long."},
    {"prompt": "Hi"},
]


@pytest.fixture
def where(tmp_path, tiny_model):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    return tmp_path


def scored(where, *arguments):
    said = refscore_here(where, "score", *arguments, "--out", "out.parquet", "--config", "experiment.yaml")
    return said, pl.read_parquet(where / "out.parquet")


def test_every_row_has_its_scores_or_its_problem(where, tiny_model):
    said, table = scored(where, "rows.jsonl")
    assert "6 rows: 0 hits, 2 scored, 3 with a problem" in said
    assert table["source_row"].to_list() == list(range(6))
    problems = table["problem"].to_list()
    assert problems[:3] == [None] * 3
    assert [problem.split()[0] for problem in problems[3:]] == ["empty_response", "too_long", "missing_field"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for row in table.head(3).iter_rows(named=True):
        truth = plain_logps(model, Request(row["prompt_ids"], row["response_ids"]))
        assert np.abs(np.array(row["logps"]) - truth).max() < 1e-4
        assert row["logp"] == pytest.approx(truth.sum(dtype=np.float64), abs=1e-4)
    assert table["logp"][0] == table["logp"][1]


def test_the_store_is_shared_with_the_pairs(where):
    refscore_here(where, "precompute", "--config", "experiment.yaml", "--run", "r")
    pairs = pl.read_parquet(where / "data/runs/r/pairs.parquet")
    write_rows(
        where / "same.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in preference_rows(8)]
    )
    said, table = scored(where, "same.jsonl")
    assert f"{len(pairs)} hits, 0 scored" in said
    by_row = dict(pairs.select("source_row", "ref_chosen_logps").iter_rows())
    assert table["logp"].to_list() == [by_row[row] for row in table["source_row"].to_list()]
    # and Parquet in, with a second time nothing to do
    pl.DataFrame([json.loads(line) for line in (where / "same.jsonl").open()]).write_parquet(where / "same.parquet")
    assert "8 hits, 0 scored" in scored(where, "same.parquet")[0]


def test_wrong_usage(where):
    said = refscore_here(where, "score", "rows.jsonl", "--out", "x.csv", "--config", "experiment.yaml", code=2)
    assert ".parquet" in said
    refscore_here(where, "score", "gone.jsonl", "--out", "x.parquet", "--config", "experiment.yaml", code=3)
