"""What shows a training's metrics: the real packages, offline; a service that fails ends no training."""

import json
import logging
import sys

import pytest

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError
from pipeline.training import trackers
from pipeline.training.trackers import open_trackers
from tests.conftest import experiment, preference_rows, refscore, refscore_here, write_rows


def trained(where, model, *report_to, code=0, command=refscore):
    config = experiment(
        where, model, write_rows(where / "d.jsonl", preference_rows(12)), train={"report_to": list(report_to)}
    )
    refscore_here(where, "precompute", "--config", config, "--run", "r")
    return command(where, "train", "--config", config, "--run", "r", code=code)


def test_trackio_has_every_step_inside_the_checkout(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    trained(tmp_path, tiny_model, "trackio")
    assert list((tmp_path / "data/cache/trackio").glob("*.db"))
    assert not (tmp_path / "data/runs/r/tensorboard").exists()
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "data/cache/trackio"))
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; runs = S.get_runs('refscore');"
        "print(json.dumps([runs, S.get_logs('refscore', runs[0])], default=str))"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runs, rows = json.loads(done.stdout.splitlines()[-1])
    assert len(runs) == 1
    assert runs[0].startswith("r-")
    assert {row["step"] for row in rows if "loss" in row} == {1, 2, 3, 4}


def test_wandb_offline_writes_beside_the_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained(tmp_path, tiny_model, "tensorboard", "wandb")
    (kept,) = (tmp_path / "data/runs/r/wandb").glob("offline-run-*/*.wandb")
    assert b"rewards/margins" in kept.read_bytes()
    assert list((tmp_path / "data/runs/r/tensorboard").glob("events.*"))


def test_one_that_is_not_installed_is_said_before_the_first_step(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    said = trained(tmp_path, tiny_model, "trackio", code=2, command=refscore_here)
    assert "uv pip install trackio" in said
    assert not (tmp_path / "data/runs/r/metrics.parquet").exists()


def test_an_unknown_one_is_no_configuration(tiny_model, tmp_path):
    config = experiment(tmp_path, tiny_model, tmp_path / "d.jsonl", train={"report_to": ["mlflow"]})
    assert "report_to" in refscore_here(tmp_path, "plan", "--config", config, code=2)


class Broken:
    def __init__(self, *_):
        self.logged = []

    def log(self, step, values):
        if step == 2:
            raise OSError("connection reset")
        self.logged.append(step)

    def flush(self): ...

    def close(self):
        raise AssertionError("it is left alone")


def test_a_service_that_fails_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "_Wandb", Broken)
    (tracker,) = open_trackers(["wandb"], Run(tmp_path), "digest", {}, None)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    assert [record.message for record in caplog.records] == [
        "wandb shows nothing from here on (connection reset); metrics.parquet has every step"
    ]


def test_a_service_that_refuses_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no key")

    monkeypatch.setattr(trackers, "_Wandb", refuse)
    with pytest.raises(ConfigError, match=r"wandb cannot be opened \(no key\): log in"):
        open_trackers(["wandb"], Run(tmp_path), "digest", {}, None)
