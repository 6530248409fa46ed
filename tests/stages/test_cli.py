"""Help is fast and whole, messages name the way out, exit codes are as designed."""

import os
import re
import subprocess
import sys

import polars as pl
import pytest

from tests.conftest import ROOT, experiment, preference_rows, refscore, refscore_here, write_rows

COMMANDS = [
    (),
    ("init",),
    ("precompute",),
    ("plan",),
    ("train",),
    ("eval",),
    ("rollout",),
    ("list",),
    ("rm",),
    ("prune",),
    ("config",),
    ("show",),
    ("validate",),
    ("verify",),
    ("view",),
    ("score",),
    ("score-missing",),
    ("compare",),
    ("judges",),
    ("sweep",),
    ("pairs",),
    ("iterate",),
    ("export",),
    ("import",),
    ("push",),
    ("repeat",),
    ("doctor",),
    ("store",),
    ("store", "ls"),
    ("store", "verify"),
    ("store", "gc"),
    ("store", "compact"),
    ("store", "adopt"),
    ("store", "explain"),
    ("store", "push"),
    ("store", "pull"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_without_torch(command):
    code = (
        "import sys; sys.argv = ['refscore', *sys.argv[1:]]\n"
        "from stages.cli import main\n"
        "try: main()\n"
        "finally: print('LOADED', {'torch', 'vllm', 'transformers', 'polars'} & sys.modules.keys())"
    )
    # once more where something else on the machine was in the way
    assert timed(code, *command, "--help") < 1.5 or timed(code, *command, "--help") < 1.5


def timed(code, *arguments):
    """Processor seconds, which other work on the machine does not lengthen."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert "LOADED set()" in done.stdout
    return spent


def test_every_command_and_option_has_help_and_every_command_stands_in_the_readme():
    import typer

    from stages.cli import app

    readme = (ROOT / "README.md").read_text()

    def walk(command, path):
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), (path, parameter.name)
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*path, name))
        if not getattr(command, "commands", None):
            assert f"refscore {' '.join(path)}" in readme, path
            assert path in COMMANDS

    walk(typer.main.get_command(app), ())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["precompute", "--config", "absent.yaml"], 2, "does not exist; shipped presets"),
        (["precompute", "--nonsense"], 2, "--nonsense"),
        (["nonsense"], 2, "nonsense"),
        (["precompute", "--config", "c.yaml", "--set", "train.bta=1"], 2, "did you mean 'train.beta'"),
        (["precompute", "--config", "c.yaml", "--run", "../up"], 2, "run name '../up'"),
        (["precompute", "--config", "c.yaml", "--run", ""], 2, "run name ''"),
        (["judges", "--run", ""], 2, "run name ''"),
        (["sweep", "--config", "c.yaml", "--run", "", "--set", "train.beta=1,2"], 2, "run name '-beta1'"),
        (["iterate", "--config", "c.yaml", "--run", ""], 2, "run name '-r1'"),
        (
            ["sweep", "--config", "c.yaml", "--set", "train.beta=-1 train.seed=2,3"],
            2,
            "--set 'train.beta=-1': train.beta",
        ),
        (["precompute", "--config", "my config.yaml"], 2, "this is that of my config.yaml: give --run NAME"),
        (["precompute", "--config", "c.yaml", "--set", "reference.model=nowhere/at/all"], 2, "no such directory"),
        (["precompute", "--config", "c.yaml", "--set", "reference.model=nobody/nothing"], 2, "Without a network"),
        (
            ["precompute", "--config", "c.yaml", "--set", "reference.model=embedded:gpt9"],
            2,
            "embedded model 'gpt9' is unknown",
        ),
        (["precompute", "--config", "c.yaml", "--set", "data.path=gone.jsonl"], 3, "no such file"),
        (["precompute", "--config", "c.yaml", "--set", "data.path=broken.jsonl"], 3, "line 1, column"),
        (["precompute", "--config", "c.yaml", "--set", "data.max_length=3"], 3, "too_long"),
        (["train", "--config", "c.yaml"], 2, "run 'refscore precompute'"),
        (["eval", "--config", "c.yaml"], 2, "run 'refscore train'"),
        (["validate", "broken.jsonl"], 3, "line 1, column"),
        (["show", "gone.parquet"], 3, "does not exist"),
        (["show", "torn.parquet"], 3, "cannot be read as Parquet"),
        (["compare", "gone"], 2, "run 'gone' does not exist"),
        (["verify", "--run", "gone"], 2, "has no configuration"),
        (["store", "ls"], 3, "does not exist"),
        (["store", "verify", "--store", "nosuch://bucket/x"], 2, "nosuch"),
        (["precompute", "--config", "c.yaml", "--set", "reference.store=d.jsonl"], 1, "is no directory"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, list) else "",
)
def test_what_a_user_gets_wrong_is_a_message_and_a_code(tmp_path, tiny_model, arguments, code, text):
    experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(4))).rename(tmp_path / "c.yaml")
    (tmp_path / "my config.yaml").write_text((tmp_path / "c.yaml").read_text())
    (tmp_path / "broken.jsonl").write_text('{"prompt" "x"}\n')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    said = refscore_here(tmp_path, *arguments, code=code)
    assert text in " ".join(said.split())


def test_a_directory_is_shown_with_what_cannot_be_read_in_it(tmp_path):
    pl.DataFrame({"a": [1, 2, 3]}).write_parquet(tmp_path / "whole.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    rows = {
        line.split()[0]: line.split()[1]
        for line in refscore_here(tmp_path, "show", ".").splitlines()
        if "parquet" in line
    }
    assert rows == {"torn.parquet": "unreadable", "whole.parquet": "3"}


def test_validate_counts_and_shows_rows_without_a_model(tmp_path):
    rows = [
        *preference_rows(3),
        {"prompt": "Hi?", "chosen": "", "rejected": "x"},
        {"prompt": 5, "chosen": "a", "rejected": "b"},
    ]
    write_rows(tmp_path / "d.jsonl", rows)
    said = refscore_here(tmp_path, "validate", "d.jsonl")
    assert "TRL explicit, strings" in said
    assert "5 rows, 3 usable, 2 dropped" in said
    assert "row 3: empty_response (chosen)" in said
    assert "row 4: wrong_type (prompt is int" in said


def test_validate_with_a_model_counts_tokens(tmp_path, tiny_model):
    write_rows(tmp_path / "d.jsonl", preference_rows(3))
    said = refscore_here(tmp_path, "validate", "d.jsonl", "--model", tiny_model, "--set", "data.max_length=70")
    assert re.search(r"prompt +\d+ +\d+ +\d+", said)
    assert "too_long" in said


def test_doctor_says_what_is_here(tmp_path):
    said = refscore(tmp_path, "doctor")
    assert re.search(r"ok +vllm", said)
    assert re.search(r"ok +python", said)


def test_doctor_names_the_fix_for_what_is_missing(tmp_path):
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if name.startswith('vllm'): raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    said = refscore(tmp_path, "doctor", code=4, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert re.search(r"missing +vllm", said)
    assert "run 'make setup'" in said
