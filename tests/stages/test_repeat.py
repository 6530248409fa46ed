"""A run is repeated from the same inputs, to the same bits on the same machine; what changed since is named."""

import json

import pytest

from tests.conftest import experiment, preference_rows, refscore_here, write_rows


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
    assert "scores    16 of 16 pairs in both, at most 0 nats apart" in said
    assert "losses at most 0 apart" in said
    assert "weights   the same bytes (model/model.safetensors)" in said
    assert "exists already" in refscore_here(where, "repeat", "r", code=2)


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


def test_an_unknown_run(where):
    assert "refscore list" in refscore_here(where, "repeat", "none", code=2)
