"""A run whose pairs are scored, and its export for TRL."""

import polars as pl
import pytest

from tests.conftest import experiment, preference_rows, refscore_here, write_rows


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model):
    """A directory with a run whose pairs are scored in float32."""
    where = tmp_path_factory.mktemp("scored")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    config = experiment(where, tiny_model, data, reference={"dtype": "float32"})
    refscore_here(where, "precompute", "--config", config, "--run", "r")
    return where


def exported(where, format_name, to):
    said = refscore_here(where, "export", "--run", "r", "--format", format_name, "--to", to)
    assert "Traceback" not in said
    return said


def pairs_of(where, split):
    return pl.read_parquet(where / "data/runs/r/pairs.parquet").filter(pl.col("split") == split)


@pytest.fixture(scope="module")
def for_trl(scored, tmp_path_factory):
    to = tmp_path_factory.mktemp("export") / "trl"
    exported(scored, "trl", to)
    return to
