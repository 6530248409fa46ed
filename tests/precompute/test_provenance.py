"""Which judge made the pairs is what their rows say, and nothing that a configuration says."""

import json

import pytest

from pipeline.artifacts.tables import read_about
from pipeline.config.files import load_config
from pipeline.pairs.rows import local_path
from tests.conftest import experiment, preference_rows, refscore_here, write_rows


def judges(tmp_path, model, rows, *settings):
    config = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    options = [part for one in settings for part in ("--set", one)]
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r", *options)
    return read_about(tmp_path / "data/runs/r/pairs.parquet")["judges"]


def test_training_rows_are_counted_by_the_judge_they_name(tmp_path, tiny_model):
    rows = preference_rows(12)
    for row in rows[:7]:
        row["provenance"] = {"judge": "rule:no\n  repetition", "run": "x"}
    rows[8]["provenance"], rows[9]["provenance"] = "by hand", {"judge": 7}
    assert judges(tmp_path, tiny_model, rows, "data.eval_fraction=0") == {"rule:no repetition": 7, "": 5}


def test_held_out_rows_do_not_count(tmp_path, tiny_model):
    rows = [row | {"provenance": {"judge": "rule:a"}} for row in preference_rows(12)]
    counted = judges(tmp_path, tiny_model, rows, "data.eval_fraction=0.5")
    assert 0 < counted["rule:a"] < 12


@pytest.mark.parametrize("preset", ["demo", "bad_rule"])
def test_data_of_ones_own_inherits_no_claim_from_a_preset(tmp_path, tiny_model, preset):
    data = write_rows(tmp_path / "mine.jsonl", preference_rows(12))
    settings = [
        f"data.path={data}",
        "data.eval_path=null",
        f"reference.model={tiny_model}",
        "reference.engine=transformers",
    ]
    options = [part for one in settings for part in ("--set", one)]
    refscore_here(tmp_path, "precompute", "--config", preset, "--run", "r", *options)
    assert set(read_about(tmp_path / "data/runs/r/pairs.parquet")["judges"]) == {""}


@pytest.mark.parametrize("preset", ["demo", "bad_rule"])
def test_the_rows_that_come_with_refscore_name_what_made_them(preset):
    config = load_config(preset)
    for name in [*config.data.path, config.data.eval_path]:
        for line in local_path(name).read_text().splitlines():
            assert json.loads(line)["provenance"] == {"judge": config.generate.pair_judge}
