"""A run is repeated from the same inputs, to the same bits on the same machine; what changed since is named."""

import json
import math
import shutil

import pyarrow as pa
import pytest
import yaml

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import METRICS
from pipeline.artifacts.tables import write_table
from pipeline.planning.repeating import same_outcome
from tests.conftest import experiment, preference_rows, refscore_here, write_rows
from tests.stages.test_stale import as_format_one


@pytest.fixture
def where(tmp_path, tiny_model, monkeypatch):
    # stages of a repetition are started as processes of their own; here they run in this one
    from stages import repeat

    data = write_rows(tmp_path / "d.jsonl", preference_rows(16))
    config = experiment(tmp_path, tiny_model, data)
    for stage in ("precompute", "train"):
        refscore_here(tmp_path, stage, "--config", config, "--run", "r")
    monkeypatch.setattr(
        repeat, "step", lambda stage, path, run, _: refscore_here(tmp_path, stage, "--config", path, "--run", run)
    )
    return tmp_path


def test_the_same_machine_gives_the_same_bits(where):
    said = refscore_here(where, "repeat", "r")
    assert "nothing differs" in said
    assert "scores    16 of 16 pairs in both, at most 0 nats apart; read from the store, not scored again" in said
    assert "losses at most 0 apart" in said
    assert "weights   the same bytes (model/model.safetensors)" in said


def test_one_that_was_interrupted_goes_on_and_another_experiment_is_left_alone(where, monkeypatch):
    from stages import repeat

    begun = repeat.step

    def interrupted(stage, path, run, overrides):
        if stage == "train":
            raise KeyboardInterrupt
        begun(stage, path, run, overrides)

    with monkeypatch.context() as once:
        once.setattr(repeat, "step", interrupted)
        said = refscore_here(where, "repeat", "r", code=1)
    assert "interrupted; what was finished is not done again: the same command goes on from there" in said
    assert "weights   the same bytes" in refscore_here(where, "repeat", "r")
    trained = ("train", "--config", where / "experiment.yaml", "--set", "train.beta=0.7")
    refscore_here(where, *trained, "--run", "other")
    assert "exists already, with other settings" in refscore_here(where, "repeat", "r", "--run", "other", code=2)
    assert "is the run to repeat" in refscore_here(where, "repeat", "r", "--run", "r", code=2)


def test_another_version_is_named_and_hinders_nothing(where):
    path = where / "data/runs/r/provenance.json"
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    said = refscore_here(where, "repeat", "r", "--check")
    assert "differs   torch: 1.0 then, " in said
    assert not (where / "data/runs/r-again").exists()


def test_other_data_or_another_model_is_no_repetition(where, tmp_path_factory):
    write_rows(where / "d.jsonl", preference_rows(17))
    said = refscore_here(where, "repeat", "r", code=4)
    assert "changed   data" in said
    assert "cannot be repeated" in said
    write_rows(where / "d.jsonl", preference_rows(16))
    path = where / "data/runs/r/provenance.json"
    content = json.loads(path.read_text())
    content["stages"]["train"]["policy"] = "0" * 64
    path.write_text(json.dumps(content))
    assert "changed   policy" in refscore_here(where, "repeat", "r", "--check", code=4)


def test_a_run_whose_tables_cannot_be_read_is_said_before_anything_is_run(where):
    pairs = where / "data/runs/r/pairs.parquet"
    whole = pairs.read_bytes()
    as_format_one(pairs)
    assert "run 'refscore precompute' again" in refscore_here(where, "repeat", "r", code=3)
    pairs.write_bytes(whole)
    (where / "data/runs/r/metrics.parquet").write_bytes(b"no table")
    said = refscore_here(where, "repeat", "r", code=3)
    assert "metrics.parquet cannot be read as Parquet" in said
    assert not (where / "data/runs/r-again").exists()


def test_another_template_or_vocabulary_is_another_input(where, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "own")
    settings = ("--config", where / "experiment.yaml", "--run", "own", "--set", "reference.model=own")
    for stage in ("precompute", "train"):
        refscore_here(where, stage, *settings, "--set", "policy.model=own")
    assert "nothing differs" in refscore_here(where, "repeat", "own", "--check")
    template = model / "chat_template.jinja"
    template.write_text("the cat " + template.read_text())
    said = refscore_here(where, "repeat", "own", "--check", code=4)
    assert "changed   reference own: its chat template is not that of the run" in said
    assert "policy" not in said.partition("error")[0]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 999, "content": "<|new|>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refscore_here(where, "repeat", "own", "--check", code=4)
    for name in ("reference", "policy"):
        assert f"changed   {name} own: its vocabulary is not that of the run" in said


def test_packages_that_are_gone_are_named_and_so_is_what_is_not_looked_at(where):
    path = where / "data/runs/r/provenance.json"
    content = json.loads(path.read_text())
    content["versions"]["jax"] = "0.4"
    content["stages"]["eval"] = {"finished": "then"}
    path.write_text(json.dumps(content))
    config = where / "data/runs/r/config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["judge"] = ["implicit", "rule:no_repetition", "panel:[rule:no_repetition, reward_model:you/rewards]"]
    settings["generate"]["models"] = {"mine": "me/model"}
    config.write_text(yaml.safe_dump(settings))
    said = refscore_here(where, "repeat", "r", "--check")
    assert "differs   jax: 0.4 then, none now" in said
    assert "unknown   generate.models.mine me/model" in said
    assert "unknown   judge panel:" in said
    assert said.count("unknown") == 2
    assert "nothing differs" not in said


def metrics(run, *rows):
    columns = {name: [row.get(name) for row in rows] for name in METRICS.names}
    write_table(run.metrics, pa.table(columns, schema=METRICS))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1.0, 2.0], [1.0, 2.5], "2 of 2 in both; losses at most 0.5 apart, loss 0.5"),
        ([1.0, 2.0], [1.0, math.nan], "losses at most 0 apart, loss 0; 1 values not comparable"),
        ([1.0, None], [1.0, 2.0], "losses at most 0 apart, loss 0; 1 values not comparable"),
        ([math.nan], [math.nan], "losses at most nothing"),
        ([math.inf, 1.0], [math.inf, 1.0], "losses at most 0 apart"),
        ([math.inf], [1.0], "losses at most inf apart"),
        ([1.0], [], "no common step, of 1 and 0"),
    ],
)
def test_how_far_steps_are_apart(tmp_path, first, second, said):
    runs = [Run(tmp_path / name) for name in "ab"]
    for run, losses in zip(runs, (first, second), strict=True):
        metrics(run, *({"step": step, "loss": loss} for step, loss in enumerate(losses)))
    (sentence,) = same_outcome(*runs)
    assert said in sentence


def test_weights_in_shards_are_compared_too(tmp_path):
    runs = [Run(tmp_path / name) for name in "ab"]
    for run in runs:
        run.model.mkdir(parents=True)
        for part in (1, 2):
            (run.model / f"model-0000{part}-of-00002.safetensors").write_bytes(b"same")
    assert same_outcome(*runs) == ["weights   the same bytes (model, 2 files)"]
    (runs[1].model / "model-00002-of-00002.safetensors").write_bytes(b"other")
    assert same_outcome(*runs) == ["weights   other bytes (model, 2 files)"]


def test_an_unknown_run(where):
    assert "refscore list" in refscore_here(where, "repeat", "none", code=2)
    assert "run name '../none':" in refscore_here(where, "repeat", "../none", code=2)
