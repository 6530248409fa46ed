"""`refscore verify`: true scores pass with figures, false ones are called what they are."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from pipeline.artifacts import schemas, tables
from pipeline.artifacts.runs import open_run
from pipeline.artifacts.tables import write_table
from pipeline.config.files import load_config
from pipeline.precompute.agreement import agreement, agreement_of_sums
from pipeline.precompute.verify import judge
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run of the tiny model, scored by transformers in float32."""
    where = tmp_path_factory.mktemp("verify")
    model = make_tiny_model(where / "model")
    data = write_rows(where / "d.jsonl", preference_rows(12))
    refscore_here(where, "precompute", "--config", experiment(where, model, data), "--run", "r")
    return where


@pytest.fixture
def where(scored, tmp_path):
    """A copy in which paths still lead to the model of the copy."""
    copy = shutil.copytree(scored, tmp_path / "copy")
    config = copy / "data/runs/r/config.yaml"
    config.write_text(config.read_text().replace(str(scored), str(copy)))
    return copy


def verdict(where, code=0, *options):
    said = refscore_here(where, "verify", "--run", "r", "--rows", 6, *options, code=code)
    return said, json.loads((where / "data/runs/r/verify.json").read_text())


def test_true_scores_pass_with_their_figures(where):
    said, kept = verdict(where)
    assert "passed: the scores are what float32 gives" in said
    assert kept["passed"]
    log = (where / "data/runs/r/log.txt").read_text()
    assert "$ refscore verify --run r" in log
    assert "passed: the scores are" in log
    assert (kept["pairs"], kept["beta"]) == (6, 0.1)
    assert kept["max_absolute_difference"] < 1e-4
    assert kept["margin_noise_reward"] == pytest.approx(0.1 * kept["margin_noise_nats"])


def test_engines_stand_side_by_side(where):
    said, kept = verdict(where, 0, "--engines", "transformers:float32,transformers:bfloat16")
    assert "transformers:bfloat16" in said
    exact, coarse = kept["engines"]["transformers:float32"], kept["engines"]["transformers:bfloat16"]
    assert exact["max_absolute_difference"] < 1e-4
    assert coarse["max_absolute_difference"] > 1e-3
    assert coarse["tokens_per_second"] > 0
    assert "'transformer'" in refscore_here(where, "verify", "--run", "r", "--engines", "transformer", code=2)


def test_scores_of_a_coarser_dtype_are_called_that(where):
    """Scored in bfloat16, but said to be float32: by the numbers alone."""
    experiment_ = where / "experiment.yaml"
    experiment_.write_text(
        experiment_.read_text().replace("engine: transformers", "engine: transformers\n  dtype: bfloat16")
    )
    refscore_here(where, "precompute", "--config", experiment_, "--run", "coarse")
    runs = where / "data/runs"
    coarse = pl.read_parquet(runs / "coarse/pairs.parquet")
    about = tables.read_about(runs / "r/pairs.parquet")
    write_table(runs / "r/pairs.parquet", coarse.to_arrow().cast(schemas.PAIRS), about)
    _, kept = verdict(where, 4)
    assert "were not computed in float32" in kept["verdict"]
    # and what the files say of themselves is compared too
    write_table(runs / "r/pairs.parquet", coarse.to_arrow().cast(schemas.PAIRS), about | {"dtype": "bfloat16"})
    assert "made in bfloat16, the run's configuration asks for float32" in verdict(where, 4)[1]["verdict"]


def test_another_chat_template_is_called_out(where):
    for name in ("model/chat_template.jinja", "model/tokenizer_config.json"):
        path = where / name
        if path.exists():
            path.write_text(path.read_text().replace("<|end|>", "<|end|> "))
    said, kept = verdict(where, 4)
    assert "chat template was changed since the pairs were made" in said
    assert not kept["passed"]


def test_a_policy_with_another_template_is_called_out(where):
    other = make_tiny_model(where / "policy")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "USER:").replace("<|{{", "[{{"))
    config = where / "data/runs/r/config.yaml"
    text = config.read_text()
    head, tail = text.split("policy:\n")
    config.write_text(head + "policy:\n" + tail.replace(str(where / "model"), str(other), 1))
    assert load_config(config).policy.model == str(other)
    assert "policy.model writes a conversation in other tokens" in verdict(where, 4)[0]


def test_one_value_that_was_never_computed_is_found(where):
    path = where / "data/runs/r/pairs.parquet"
    table = pl.read_parquet(path)
    logps = table["ref_chosen_token_logps"].to_list()
    for row in logps:
        row[3] -= 0.01
    spoiled = table.with_columns(pl.Series("ref_chosen_token_logps", logps))
    write_table(path, spoiled.to_arrow().cast(schemas.PAIRS), tables.read_about(path))
    assert "single values are wrong" in verdict(where, 4)[1]["verdict"]


def test_figures_by_hand():
    truth = [np.zeros(4), np.zeros(2)]
    found = agreement([np.array([0.1, 0.1, 0.1, 0.1]), np.array([-0.1, 0.3])], truth, beta=0.5)
    assert found["mean_signed_difference"] == pytest.approx(0.1)
    assert found["mean_absolute_difference"] == pytest.approx(0.8 / 6)
    assert found["max_absolute_difference"] == pytest.approx(0.3)
    assert found["margin_noise_nats"] == pytest.approx(0.2)
    assert found["margin_noise_reward"] == pytest.approx(0.1)
    assert found["correlation_with_length"] == pytest.approx(1.0)
    assert not judge(found, "bfloat16")["passed"]


def test_figures_of_sums_by_hand():
    """A response of four tokens that is 2 nats off, and one of a single token that is half a nat off the other way."""
    found = agreement_of_sums([-3.0, -1.5], [-5.0, -1.0], [4, 1], beta=0.5)
    assert found["tokens"] == 5
    assert found["mean_signed_difference"] == pytest.approx(1.5 / 5)
    assert found["mean_absolute_difference"] == pytest.approx(2.5 / 5)
    assert found["max_absolute_difference"] == pytest.approx(2 / 4**0.5)
    assert found["max_sequence_difference"] == pytest.approx(2.0)
    assert found["margin_noise_nats"] == pytest.approx(2.5)
    assert found["margin_noise_reward"] == pytest.approx(1.25)
    assert "sums were compared" in judge(found, "unknown", by_sum=True)["verdict"]
    nothing = dict.fromkeys(found, 0.0)
    assert "in a dtype that is not known" in judge(nothing, "unknown")["verdict"]


def test_a_run_that_does_not_exist_is_no_traceback(tmp_path):
    assert not open_run("r").pairs.exists()
    refscore_here(tmp_path, "verify", "--run", "r", code=2)
