"""A reference in bfloat16 whose values are kept in fixed point: every command works with it, and the numbers hardly change."""

import json
import re
import shutil

import numpy as np
import polars as pl
import pytest

from pipeline.artifacts.schemas import PAIRS, RESPONSES
from pipeline.artifacts.tables import read_about, write_table
from tests.conftest import experiment, preference_rows, refscore_here, write_rows

COARSE = ["--set", "reference.dtype=bfloat16"]
ROUNDED = [*COARSE, "--set", "reference.logps=fixed_point"]


@pytest.fixture(scope="module")
def where(tmp_path_factory, tiny_model):
    """Two runs: the same scores, kept exact and in fixed point."""
    where = tmp_path_factory.mktemp("fixed_point")
    experiment(where, tiny_model, write_rows(where / "d.jsonl", preference_rows(12)))
    for run, settings in (("exact", COARSE), ("rounded", ROUNDED)):
        refscore_here(where, "precompute", "--config", where / "experiment.yaml", "--run", run, *settings)
    return where


def pairs(where, run):
    return pl.read_parquet(where / f"data/runs/{run}/pairs.parquet")


def reference(where, run):
    return json.loads((where / f"data/runs/{run}/provenance.json").read_text())["reference_id"]


def command(where, *arguments, code=0):
    return refscore_here(where, *arguments, "--config", where / "experiment.yaml", *ROUNDED, code=code)


def test_values_are_rounded_and_sums_are_not(where):
    exact, rounded = pairs(where, "exact"), pairs(where, "rounded")
    for side in ("chosen", "rejected"):
        assert rounded[f"ref_{side}_logps"].equals(exact[f"ref_{side}_logps"])
        before, after = (np.concatenate(table[f"ref_{side}_token_logps"].to_list()) for table in (exact, rounded))
        assert 0 < np.abs(before.astype(np.float64) - after).max() <= 2.0**-13
    assert reference(where, "exact") != reference(where, "rounded")


def test_the_gate_lets_it_pass_and_a_training_runs(where):
    assert "gate      passed" in command(where, "train", "--run", "rounded")


def test_responses_are_read_as_pairs_are(where):
    kto = ["--set", "train.loss_type=kto", "--set", "train.max_steps=1"]
    command(where, "precompute", "--run", "responses", *kto)
    assert "gate      passed" in command(where, "train", "--run", "responses", *kto)


@pytest.mark.parametrize(
    ("run", "settings", "column"),
    [
        ("rounded", [], "chosen"),
        ("responses", ["--set", "train.loss_type=kto", "--set", "train.max_steps=1"], "response"),
    ],
)
def test_a_sum_that_rounding_does_not_explain_is_found(where, tmp_path, run, settings, column):
    copy = shutil.copytree(where, tmp_path / "copy")
    command(copy, "precompute", "--run", "new", *settings)
    table = open_run_table(copy)
    about = read_about(table)
    assert about["rounding"] == 2.0**-13
    rows = pl.read_parquet(table)
    tokens = rows[f"{column}_ids"].list.len()
    spoiled = rows.with_columns(pl.col(f"ref_{column}_logps") - tokens * 2.0**-13 * 2)
    write_table(table, spoiled.to_arrow().cast(PAIRS if table.stem == "pairs" else RESPONSES), about)
    command(copy, "train", "--run", "new", *settings, code=3)


def open_run_table(where):
    (table,) = [path for path in (where / "data/runs/new").glob("*.parquet") if path.stem in ("pairs", "responses")]
    return table


def test_the_store_counts_checks_and_explains_it(where):
    assert re.search("logps in.*fixed point", refscore_here(where, "store", "ls"), re.DOTALL)
    assert "0 damaged" in refscore_here(where, "store", "verify")
    assert "24 hits, 0 misses" in command(where, "store", "explain")


def test_what_kept_scores_from_being_found_is_named(where, tmp_path):
    (tmp_path / "store").mkdir()
    exact = reference(where, "exact")
    (tmp_path / "store" / exact).symlink_to(where / "data/store" / exact)
    said = command(where, "store", "explain", "--set", f"reference.store={tmp_path / 'store'}")
    assert "numerics: logps absent -> 'fixed_point'" in said


def test_a_sample_of_it_is_compared_with_float32(where):
    assert "passed: the scores are what bfloat16 gives" in refscore_here(
        where, "verify", "--run", "rounded", "--rows", 6, "--engines", "transformers:float32"
    )


def test_copied_it_is_found_elsewhere(where, tmp_path):
    command(where, "store", "push", tmp_path / "all", "--store", where / "data/store")
    command(where, "store", "pull", tmp_path / "all", "--store", tmp_path / "part")
    settings = [*ROUNDED, "--set", f"reference.store={tmp_path / 'part'}"]
    said = refscore_here(where, "precompute", "--config", where / "experiment.yaml", "--run", "copy", *settings)
    assert "24 hits, 0 misses" in said
    assert pairs(where, "copy").equals(pairs(where, "rounded"))


def test_exact_scores_may_be_adopted_and_rounded_ones_not_the_other_way(where, tmp_path):
    old = reference(where, "exact")
    settings = ["--set", f"reference.store=[{tmp_path / 'new'},{where / 'data/store'}]"]
    asked = ["--config", where / "experiment.yaml", *ROUNDED, *settings]
    refscore_here(where, "store", "adopt", old, *asked)
    refscore_here(where, "precompute", "--run", "adopted", *asked, "--set", "data.max_rows=12")
    back = ["--config", where / "experiment.yaml", *COARSE, *settings]
    said = refscore_here(where, "store", "adopt", reference(where, "rounded"), *back, code=2)
    assert "keeps logps in fixed point" in said
