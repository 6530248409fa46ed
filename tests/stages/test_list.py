"""What is here, and what may go: list, rm, prune; no torch for any of them."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.artifacts.runs import Run
from pipeline.artifacts.writer import LOCK, writing
from stages.list import size
from tests.artifacts.test_writer import holding, kill
from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """A directory with a run that is trained, one that is scored, and one of which only the log was begun."""
    where = tmp_path_factory.mktemp("runs")
    data = write_rows(where / "preferences.jsonl", preference_rows(24))
    train = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2}
    config = experiment(where, tiny_model, data, train=train)
    for run in ("trained", "scored"):
        refscore_here(where, "precompute", "--config", config, "--run", run)
    refscore_here(where, "train", "--config", config, "--run", "trained")
    (where / "data/runs/begun").mkdir()
    (where / "data/runs/begun/log.txt").write_text("x  $ refscore precompute\n")
    (where / "data/runs/notes").mkdir()
    return where, config


@pytest.fixture
def here(made, tmp_path):
    """A copy of it."""
    subprocess.run(["cp", "-r", made[0] / "data", tmp_path / "data"], check=True)
    return tmp_path


def listed(where):
    found = json.loads(refscore_here(where, "list", "--json").split("\n{", 1)[-1].join(["{", ""]))
    return {run["name"]: run for run in found["runs"]}


def test_runs_are_listed_with_how_far_they_have_come(here):
    runs = listed(here)
    assert {name: run["state"] for name, run in runs.items()} == {
        "trained": "trained",
        "scored": "scored",
        "begun": "begun",
    }
    assert (runs["trained"]["step"], runs["trained"]["steps"]) == (4, 4)
    assert runs["scored"]["step"] is None
    held = sum(path.stat().st_size for path in (here / "data/runs/trained").rglob("*") if path.is_file())
    assert runs["trained"]["bytes"] == held
    said = refscore_here(here, "list")
    assert size(held) in said
    assert "running" not in said


def test_a_training_is_listed_with_its_step_while_it_runs(here):
    run = here / "data/runs/trained"
    (run / "model").rename(run / "gone")
    child = holding(run)
    try:
        state = listed(here)["trained"]
        assert (state["state"], state["writer"]["pid"]) == ("training", child.pid)
        said = refscore_here(here, "list")
        assert "training, step 4 of 4" in said
        assert "running" in said
        assert f"trained: process {child.pid} on " in said
    finally:
        kill(child)
    assert "running" not in refscore_here(here, "list")


def test_an_evaluation_is_listed_with_its_figures_and_counts_until_the_next_training(here):
    run = here / "data/runs/trained"
    interval = {"mean": 0.82, "low": 0.78, "high": 0.86}
    results = {
        "judges": {"implicit": {"rate": interval}, "failed": None, "rule:x": {"rate": interval}},
        "held_out": {"reward_accuracy": 0.75},
        "cost": {"policy": {"kl": {"mean": 1.234, "low": 1.1, "high": 1.4}}},
    }
    (run / "eval.json").write_text(json.dumps(results))
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["stages"]["eval"] = {"finished": "2999-01-01T00:00:00+00:00"}
    (run / "provenance.json").write_text(json.dumps(provenance))
    state = listed(here)["trained"]
    assert state["state"] == "evaluated"
    assert state["figures"] == {"judge": "rule:x", "win_rate": interval, "reward_accuracy": 0.75, "kl": results["cost"]["policy"]["kl"]}  # fmt: skip
    said = refscore_here(here, "list")
    assert "82% (78% to 86%)" in said
    assert "1.23 (1.10 to 1.40)" in said
    assert "by rule:x" in said
    provenance["stages"]["eval"]["finished"] = "1999-01-01T00:00:00+00:00"
    (run / "provenance.json").write_text(json.dumps(provenance))
    assert listed(here)["trained"]["state"] == "trained"
    # a file that is none is no reason to fail
    (run / "eval.json").write_text('{"judges": 5}')
    assert listed(here)["trained"]["figures"] == {}


def test_none_of_them_imports_torch_or_scipy(here):
    code = "import sys; sys.argv = ['refscore', *sys.argv[1:]]\nfrom stages.cli import main\ntry: main()\nfinally: print(sorted({'torch', 'scipy', 'transformers'} & sys.modules.keys()))"
    for command in (["list"], ["prune"], ["config"], ["rm", "--yes", "begun"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            cwd=here, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout.endswith("\n[]\n"), command


def test_no_runs_are_a_sentence(tmp_path):
    assert "no runs in data/runs" in refscore_here(tmp_path, "list")


def test_a_run_is_deleted_where_nobody_can_be_asked_only_if_told(here):
    assert "say --yes" in refscore_here(here, "rm", "scored", code=2)
    assert "scored" in listed(here)
    refscore_here(here, "rm", "scored", "begun", "--yes")
    assert sorted(path.name for path in (here / "data/runs").iterdir()) == ["notes", "trained"]
    assert list((here / "data/store").rglob("scores-*.parquet"))


def test_a_run_is_deleted_if_the_answer_is_yes(here, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, left in ((False, True), (True, False)):
        monkeypatch.setattr("typer.confirm", lambda *_, **__: answer)  # noqa: B023  # called at once
        refscore_here(here, "rm", "scored")
        assert (here / "data/runs/scored").exists() == left


def test_no_run_is_deleted_if_one_is_absent_or_being_written(here):
    assert "run 'gone' does not exist in data/runs; there are: begun, scored, trained" in refscore_here(
        here, "rm", "scored", "gone", "--yes", code=2
    )
    # a directory that is no run is not deleted for one
    refscore_here(here, "rm", "notes", "--yes", code=2)
    refscore_here(here, "rm", "../runs", "--yes", code=2)
    child = holding(here / "data/runs/trained")
    try:
        assert f"written by process {child.pid}" in refscore_here(here, "rm", "scored", "trained", "--yes", code=1)
    finally:
        kill(child)
    assert {"scored", "trained"} <= listed(here).keys()


def test_who_names_a_run_that_is_deleted_is_told(here):
    config = here / "data/runs/scored/config.yaml"
    config.write_text(config.read_text() + "\n# model: data/runs/trained/model\n")
    assert "run 'scored' names a file of it" in refscore_here(here, "rm", "trained", code=2)


def test_pruning_frees_checkpoints_of_finished_runs_alone_and_only_if_told(here):
    run = here / "data/runs/trained"
    checkpoints = sorted((run / "checkpoints").iterdir())
    held = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    unfinished = here / "data/runs/scored/checkpoints/step_000001"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"1")
    leftover = here / "data/runs/scored/.tmp-4194999-aa-pairs.parquet"
    leftover.write_bytes(b"12345")
    half_deleted = here / "data/runs/.tmp-4194999-aa-old"
    half_deleted.mkdir()
    said = refscore_here(here, "prune")
    assert f"{size(held + 5)} could be freed; nothing was changed" in said
    assert "scored: its training is not finished" in said
    assert sorted((run / "checkpoints").iterdir()) == checkpoints
    assert f"freed {size(held + 5)}" in refscore_here(here, "prune", "--apply")
    assert not list((run / "checkpoints").iterdir())
    assert unfinished.exists()
    assert not leftover.exists()
    assert not half_deleted.exists()


def test_a_pruned_run_is_still_known_to_be_trained(here, made):
    refscore_here(here, "prune", "trained", "--apply")
    assert "nothing to train" in refscore_here(here, "train", "--config", made[1], "--run", "trained")


def test_a_run_that_is_written_is_not_pruned(here):
    child = holding(here / "data/runs/trained")
    try:
        assert f"trained: left as it is, process {child.pid}" in refscore_here(here, "prune", "--apply")
    finally:
        kill(child)
    assert list((here / "data/runs/trained/checkpoints").iterdir())


def test_a_stage_refuses_a_run_that_another_writes_and_readers_do_not_mind(here, made):
    child = holding(here / "data/runs/trained")
    try:
        for stage in ("precompute", "train", "eval", "pairs"):
            said = refscore_here(here, stage, "--config", made[1], "--run", "trained", code=1)
            assert f"run 'trained' is being written by process {child.pid} on " in said
        for reading in (["show", "data/runs/trained"], ["compare", "trained", "scored"], ["list"]):
            refscore_here(here, *reading)
    finally:
        kill(child)


def test_python_is_refused_too(here):
    from pipeline import load_config, open_run, train
    from pipeline.errors import RefscoreError

    child = holding(here / "data/runs/trained")
    try:
        with pytest.raises(RefscoreError, match="is being written by process"):
            train(load_config("demo"), open_run("trained"))
    finally:
        kill(child)


def test_a_deleted_run_that_another_waits_for_is_made_anew(here):
    run = Run(here / "data/runs/scored")
    with writing(run):
        (run.directory).rename(here / "elsewhere")
    with writing(run):
        assert (run.directory / LOCK).exists()


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (34_567, "35 kB"), (2_200_000_000, "2.2 GB")])  # fmt: skip
def test_sizes_are_told_as_people_say_them(count, words):
    assert size(count) == words
