"""What is given to make arrives at the command as it was given: paths with spaces and quotes, brackets, dollars, no name."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from stages import sweep
from tests.conftest import ROOT, preference_rows, refscore_here, write_rows

DEMO = ["--config", "pipeline/presets/demo.yaml"]


@pytest.fixture
def make(tmp_path):
    """make in a directory whose refscore writes down its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    command = tmp_path / ".venv/bin/refscore"
    command.write_text("#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    command.chmod(0o755)
    (tmp_path / ".venv/.run").touch()

    # if make runs the tests, the make in them is one of its own all the same: it announces no directories and takes on no options
    outside = {name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(*arguments, **environment):
        done = subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env=outside | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_nothing_given(make):
    assert make("precompute") == ["precompute", *DEMO]
    assert make("plan") == ["precompute", "--plan", *DEMO]


def test_a_name_that_was_given_is_passed_on_an_empty_one_too(make):
    assert make("train", "RUN=mine") == ["train", *DEMO, "--run", "mine"]
    assert make("train", "RUN=") == ["train", *DEMO, "--run", ""]
    assert make("train", RUN="a b") == ["train", *DEMO, "--run", "a b"]


def test_devices_are_passed_to_the_training(make):
    assert make("train", "DEVICES=2") == ["train", "--devices", "2", *DEMO]
    assert make("train", "DEVICES=1") == ["train", *DEMO]


def test_an_objective_is_passed_to_the_rounds(make):
    assert make("rollout") == ["rollout", *DEMO]
    assert make("iterate") == ["iterate", "--rounds", "2", *DEMO]
    given = ["--set", "train.objective=policy_gradient"]
    assert make("iterate", "ROUNDS=3", "OBJECTIVE=policy_gradient") == ["iterate", "--rounds", "3", *given, *DEMO]


@pytest.mark.parametrize(
    "settings",
    [
        "train.beta=0.1 train.seed=2",
        "data.path=my pairs.jsonl",
        "data.path=Bob's $HOME `pairs`.jsonl",
        'data.columns={prompt: question, chosen: "a b", rejected: c}',
        "judge=[rule:regex=a$, implicit]",
    ],
)
def test_settings_arrive_as_they_were_given(make, settings):
    assert make("eval", f"SET={settings}") == ["eval", *DEMO, "--set", settings]
    assert make("eval", SET=settings) == ["eval", *DEMO, "--set", settings]


def test_a_configuration_in_a_directory_with_a_space(make):
    assert make("eval", "CONFIG=my dir/it's.yaml") == ["eval", "--config", "my dir/it's.yaml"]


def test_the_command_understands_what_make_passes_on(tmp_path, tiny_model):
    rows = [
        {"question": row["prompt"], "good one": row["chosen"], "bad": row["rejected"]} for row in preference_rows(8)
    ]
    write_rows(tmp_path / "Bob's pairs.jsonl", rows)
    settings = (
        "data.path=Bob's pairs.jsonl data.columns={prompt: question, chosen: good one, rejected: bad} "
        f"reference.model={tiny_model} reference.engine=transformers data.max_length=200"
    )
    said = refscore_here(tmp_path, "precompute", "--plan", "--config", "neutral", "--set", settings)
    assert "8 read, 8 pairs" in said


def test_a_sweep_finds_its_axes_in_one_text(monkeypatch):
    monkeypatch.setattr(sweep, "step", lambda *_: None)
    runs = sweep.main(Path("demo"), "s", ["train.beta=1,2 train.seed=3,4"])
    assert [run.name for run in runs] == ["s-beta1-seed3", "s-beta1-seed4", "s-beta2-seed3", "s-beta2-seed4"]
