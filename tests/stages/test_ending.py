"""How commands end and what they say: interrupted, without a reader, on a full disk; whole help; a log of every run."""

import os
import re
import signal
import subprocess
import sys

import pytest

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError
from stages import ending
from tests import forked
from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows
from tests.stages.test_cli import COMMANDS

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def shell(where, script, **environment):
    """Run `script`, in which `refscore` is the command line; its exit code, stdout and stderr."""
    defined = f'refscore() {{ {sys.executable} -m stages.cli "$@"; }}; set -o pipefail; '
    return subprocess.run(
        ["bash", "-c", defined + script],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, **environment},
    )


@pytest.fixture
def config(tmp_path, tiny_model):
    data = write_rows(tmp_path / "preferences.jsonl", preference_rows(24))
    return experiment(tmp_path, tiny_model, data, train={"max_steps": 6, "save_steps": 2, "eval_steps": 0})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_eighty_columns_and_cuts_no_sentence(monkeypatch, command):
    import typer

    from stages.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    found = typer.main.get_command(app)
    sentences = []
    for name in command:
        found = found.commands[name]
    context = found.make_context("refscore", [], resilient_parsing=True)
    shown = found.get_help(context)
    sentences = [inner.help for inner in getattr(found, "commands", {}).values()] + [found.help]
    assert max(map(len, shown.splitlines())) <= 80
    for sentence in sentences:
        assert " ".join(sentence.split()) in " ".join(shown.split())


def test_every_command_may_be_quiet_or_verbose_but_not_both(tmp_path):
    write_rows(tmp_path / "d.jsonl", preference_rows(2))
    for command in COMMANDS:
        if command not in ((), ("store",)):
            assert "--quiet" in refscore_here(tmp_path, *command, "--help")
    assert "exclude each other" in refscore_here(tmp_path, "validate", "d.jsonl", "-q", "-v", code=2)


def test_the_version_is_told_without_a_heavy_import(tmp_path):
    from pipeline import __version__

    code = "import sys; sys.argv = ['refscore', '--version']\nfrom stages.cli import main\ntry: main()\nfinally: print(sorted({'torch', 'polars', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == f"refscore {__version__}\n[]\n"


def test_a_shell_is_told_how_to_complete(tmp_path):
    said = shell(tmp_path, "refscore --show-completion bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "complete -o default -F" in said.stdout
    words = shell(tmp_path, "refscore", _REFSCORE_COMPLETE="complete_bash", COMP_WORDS="refscore sto", COMP_CWORD="1")
    assert words.stdout.split() == ["store"]
    for run in ("one", "other", "two"):
        (tmp_path / "data/runs" / run).mkdir(parents=True)
        (tmp_path / "data/runs" / run / "config.yaml").touch()
    for before in ("refscore compare", "refscore train --run"):
        words = shell(tmp_path, "refscore", _REFSCORE_COMPLETE="complete_bash", COMP_WORDS=f"{before} o", COMP_CWORD=str(len(before.split())))  # fmt: skip
        assert words.stdout.split() == ["one", "other"]


def test_a_quiet_training_says_nothing_and_its_log_everything(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    assert forked.refscore(tmp_path, "train", "--config", config, "--run", "r", "-q") == ""
    log = (tmp_path / "data/runs/r/log.txt").read_text()
    times = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d  ", log, re.MULTILINE)
    assert len(times) == len(log.splitlines())
    lines = [line.partition("  ")[2] for line in log.splitlines()]
    assert [line for line in lines if line.startswith("$")] == [
        f"$ refscore precompute --config {config} --run r",
        f"$ refscore train --config {config} --run r -q",
    ]
    assert any(line.startswith("pairs     data/runs/r") for line in lines)
    assert any(line.startswith("training 6/6  loss") for line in lines)
    assert re.fullmatch(r"done in \d+ s", lines[-1])


def test_a_command_that_fails_before_it_writes_leaves_no_run(tmp_path, config):
    refscore_here(tmp_path, "train", "--config", config, "--run", "never", code=2)
    assert not (tmp_path / "data/runs/never").exists()
    refscore_here(tmp_path, "precompute", "--plan", "--config", config, "--run", "never")
    assert not (tmp_path / "data/runs/never").exists()


# a training that stops itself, at the beginning of step 4
STOPPED = """
import os, signal, sys, time
from pipeline.training import loop
from stages.cli import main
inner, count = loop.accumulate, 0
def counting(*args):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.{signal})
        time.sleep(5)
    return inner(*args)
loop.accumulate = counting
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_training_says_from_which_step_it_goes_on_and_does(tmp_path, config, name):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    command = ["train", "--config", config, "--run", "r"]
    done = forked.run(tmp_path, STOPPED.format(signal=name), *command)
    how = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert (done.returncode, done.stderr) == (1, f"error: {how}; the same command goes on from step 2\n")
    assert not list((tmp_path / "data/runs/r").rglob(".*"))
    said = refscore_here(tmp_path, *command)
    # one bar for the whole training, not for what is left of it
    assert "training 3/6  loss" in said
    assert "training 6/6  loss" in said


def test_what_is_started_with_nohup_goes_on_when_its_terminal_goes(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    stopped = STOPPED.format(signal="SIGHUP").replace("(5)", "(0)")
    done = forked.run(tmp_path, ignored + stopped, "train", "--config", config, "--run", "r")
    assert done.returncode == 0, done.stderr


def test_output_that_nobody_reads_ends_a_reading_command_well(tmp_path):
    write_rows(tmp_path / "d.jsonl", preference_rows(2))
    for script in ("refscore validate d.jsonl | true", "refscore --help | true", "refscore store --help | head -1"):
        done = shell(tmp_path, script)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_output_that_nobody_reads_stops_a_training_which_says_so(tmp_path, config):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    done = shell(tmp_path, f"refscore train --config {config} --run r | head -1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stopped, as nobody reads the output any more; ")
    assert "nobody reads" in (tmp_path / "data/runs/r/log.txt").read_text()


def test_output_that_cannot_be_written_is_a_message(tmp_path):
    write_rows(tmp_path / "d.jsonl", preference_rows(2))
    for script in ("refscore validate d.jsonl > /dev/full", "refscore show d.jsonl > /dev/full"):
        done = shell(tmp_path, script)
        assert (done.returncode, done.stderr) == (1, "error: the output cannot be written (No space left on device): send it elsewhere\n")  # fmt: skip
    done = shell(tmp_path, "refscore --help > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left")


def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path):
    write_rows(tmp_path / "d.jsonl", preference_rows(2))
    assert shell(tmp_path, "refscore validate d.jsonl >&-").returncode == 0
    assert shell(tmp_path, "refscore validate d.jsonl >&- 2>&- <&-").returncode == 0
    assert shell(tmp_path, "refscore validate absent.jsonl 2>&-").returncode == 3


def of_rust():
    """Safetensors' own class of errors."""
    from safetensors import SafetensorError

    return SafetensorError


@pytest.mark.parametrize("number", [5, 13, 20, 21, 24, 28, 30, 36, 116, 122])
def test_what_a_disk_says_is_no_bug(number):
    words = os.strerror(number)
    for error in (OSError(number, words, "data/x"), of_rust()(f"I/O error: {words} (os error {number})")):
        assert words in ending._explained(error)


def test_too_little_memory_is_no_bug_and_a_type_error_is():
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")):
        assert "refscore plan" in ending._explained(error)
    for error in (TypeError("x"), FileNotFoundError(2, "No such file"), ValueError("os error")):
        assert ending._explained(error) is None


def test_a_full_disk_is_told_also_by_libraries_written_in_rust():
    kind = of_rust()
    with pytest.raises(RefscoreError, match="no space left to write x"), durable.explaining_disk("x"):
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RefscoreError, match="cannot be written"), durable.explaining_disk("x"):
        raise kind("I/O error: Read-only file system (os error 30)")


def test_a_stage_of_several_is_given_time_to_end(tmp_path, config):
    """Ctrl-C in a terminal reaches the sweep and its stage: the stage ends by itself, and both say how it goes on."""
    script = f"refscore sweep --config {config} --run s --set train.beta=0.1,0.2"
    child = subprocess.Popen(
        ["bash", "-c", f"exec {sys.executable} -m stages.cli {script.removeprefix('refscore ')}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    for line in child.stdout:
        if line.startswith(("step 0", "training 1")):
            break
    os.killpg(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert re.search(r"interrupted; (no checkpoint|the same command goes on from step)", said), said
    assert "interrupted; what was finished is not done again" in said
    assert not list((tmp_path / "data/runs").rglob(".*"))


SLOW = """
import os, signal, sys, threading, time
from pathlib import Path
from stages import steps
slow = Path("slow").absolute()
slow.write_text("#!/bin/sh\\ntrap 'sleep 1; touch ended; exit 1' TERM\\ntouch begun\\nwhile :; do sleep 0.1; done\\n")
slow.chmod(0o755)
def interrupt():
    while not Path("begun").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
sys.executable = str(slow)
try:
    steps.step("train", Path("c.yaml"), "r", [])
except KeyboardInterrupt:
    print("ended" if Path("ended").exists() else "killed")
"""


def test_a_stage_that_takes_a_moment_to_end_is_waited_for(tmp_path):
    done = subprocess.run([sys.executable, "-c", SLOW], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "ended"
