"""What shows a training's metrics: the real packages, offline; a service that fails ends no training."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError
from pipeline.training.records import trackers
from pipeline.training.records.trackers import open_trackers
from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows
from tests.forked import refscore


def trained(where, model, *report_to, code=0, command=refscore):
    config = experiment(
        where, model, write_rows(where / "d.jsonl", preference_rows(12)), train={"report_to": list(report_to)}
    )
    refscore_here(where, "precompute", "--config", config, "--run", "r")
    said = command(where, "train", "--config", config, "--run", "r", code=code)
    return said if code else config


def test_trackio_has_every_step_inside_the_checkout(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    config = trained(tmp_path, tiny_model, "trackio")
    # begun again, it is another curve
    refscore(tmp_path, "train", "--config", config, "--run", "r", "--restart")
    assert list((tmp_path / "data/cache/trackio").glob("*.db"))
    assert not (tmp_path / "data/runs/r/tensorboard").exists()
    curves = trackio_has(tmp_path)
    assert [name.rpartition("-")[2] for name in curves] == ["1", "2"]
    assert len({name.rpartition("-")[0] for name in curves}) == 1
    for rows in curves.values():
        assert sorted(row["step"] for row in rows if "loss" in row) == [1, 2, 3, 4]


def trackio_has(where):
    """Every run's rows, by its name; read in a process of its own, as trackio does."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; runs = sorted(S.get_runs('refscore'));"
        "print(json.dumps({run: S.get_logs('refscore', run) for run in runs}, default=str))"
    )
    place = {**os.environ, "TRACKIO_DIR": str(where / "data/cache/trackio")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=place)
    return json.loads(done.stdout.splitlines()[-1])


TRACKED = """
import json, sys
from pathlib import Path
from pipeline.artifacts.runs import Run
from pipeline.training.records.trackers import open_trackers
(tracker,) = open_trackers(["trackio"], Run(Path("r")), "digest-1", {}, json.loads(sys.argv[1]))
for step, names in json.loads(sys.argv[2]):
    tracker.log(step, dict.fromkeys(names, 1.0))
tracker.close()
"""


def test_resumed_trackio_is_told_nothing_twice_and_all_that_it_lacks(tmp_path, monkeypatch):
    """Killed while it was evaluated after step 3, with a checkpoint of step 2."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "data/cache/trackio"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps = [[1, ["loss"]], [2, ["loss"]], [2, ["eval_loss"]], [3, ["loss"]]]
    for resumed_at, told in ((None, steps), (2, [[3, ["loss"]], [3, ["eval_loss"]], [4, ["loss"]]])):
        arguments = [json.dumps(resumed_at), json.dumps(told)]
        subprocess.run([sys.executable, "-c", TRACKED, *arguments], check=True, capture_output=True)
    (rows,) = trackio_has(tmp_path).values()
    shown = sorted((row["step"], name) for row in rows for name in row if name.endswith("loss"))
    assert shown == [(1, "loss"), (2, "eval_loss"), (2, "loss"), (3, "eval_loss"), (3, "loss"), (4, "loss")]


def test_resumed_wandb_is_told_no_step_that_it_has(tmp_path, monkeypatch):
    told = []
    shown = SimpleNamespace(step=4, log=lambda values, step: told.append(step), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: shown))
    (tracker,) = open_trackers(["wandb"], Run(tmp_path), "digest-1", {}, 2)
    for step in (3, 4, 5):
        tracker.log(step, {"loss": 1.0})
    assert told == [4, 5]


def test_one_that_opened_is_closed_if_the_next_cannot_be(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(trackers, "_Wandb", lambda *_: SimpleNamespace(close=lambda: closed.append("wandb")))
    with pytest.raises(ConfigError, match="uv pip install trackio"):
        open_trackers(["wandb", "trackio"], Run(tmp_path), "digest-1", {}, None)
    assert closed == ["wandb"]


def test_wandb_offline_writes_beside_the_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.delenv(f"WANDB_{name}_DIR", raising=False)
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    trained(tmp_path, tiny_model, "tensorboard", "wandb")
    assert not list((tmp_path / "home").rglob("*wandb*"))
    assert list((tmp_path / "data/cache/wandb").rglob("*.log"))
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


def test_one_named_twice_is_no_configuration(tiny_model, tmp_path):
    config = experiment(tmp_path, tiny_model, tmp_path / "d.jsonl", train={"report_to": ["wandb", "wandb"]})
    assert "the same tracker is named twice" in refscore_here(tmp_path, "plan", "--config", config, code=2)


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
