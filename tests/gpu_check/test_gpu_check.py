"""The check for GPUs must be able to fail, must notice that kernels were not run, and must say what it left out."""

import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engines.transformers import TransformersScorer
from pipeline.forward import routes
from pipeline.forward.attention import Pack
from pipeline.forward.routes import Route
from tests.benchmarks.trl_training import embedded
from tests.gpu_check import __main__ as check
from tests.gpu_check import cell, correctness, speed
from tests.gpu_check.cell import NotMade, directory_of

FAMILY = "Mistral, window of 160"


@pytest.fixture(scope="module")
def embedded_once(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("embedded")):
        return embedded()


@pytest.fixture(autouse=True)
def _embedded(embedded_once, monkeypatch):
    """Unpacking the embedded model takes twenty seconds, and every test has a directory of its own."""
    monkeypatch.setattr(cell, "embedded", lambda: embedded_once)


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_a_window_that_is_short_by_one_token_falls_short(arithmetic, monkeypatch, tmp_path):
    honest = Pack.may_see
    monkeypatch.setattr(Pack, "may_see", lambda pack, window: honest(pack, window - 1 if window else window))
    # the trial on a small twin would notice it too, and read another way
    monkeypatch.setattr(correctness, "route_of", lambda *_: Route("packed"))
    monkeypatch.setattr(routes, "_why_not", lambda *_: None)
    found = check.run_cell("packed against plain", [FAMILY, arithmetic], tmp_path)
    assert found["outcome"] == "FELL SHORT"
    assert "logps differ" in found["why"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_that_lie_one_token_off_fall_short(dtype, monkeypatch, tmp_path):
    check.run_cell("random models", ["tiny"], tmp_path)
    assert check.run_cell("engine against trainer", ["transformers", dtype], tmp_path)["outcome"] == "ok"
    honest = TransformersScorer.score
    monkeypatch.setattr(
        TransformersScorer, "score", lambda self, sequences: [np.roll(one, 1) for one in honest(self, sequences)]
    )
    found = check.run_cell("engine against trainer", ["transformers", dtype], tmp_path)
    assert found["outcome"] == "FELL SHORT"


def test_another_way_of_reading_falls_short(monkeypatch, tmp_path):
    """It gives the same numbers, and no kernel was tried."""

    def refuses(*_):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(routes, "read_packed", refuses)
    found = check.run_cell("packed against plain", [FAMILY, "float32"], tmp_path)
    assert found["outcome"] == "FELL SHORT"
    assert "not packed" in found["why"]
    assert "no kernel for this" in found["why"]


def test_layers_that_are_not_compiled_fall_short(monkeypatch, tmp_path):
    monkeypatch.setattr(correctness, "compile_layers", lambda _: 0)
    found = check.run_cell("packed against plain", [FAMILY, "bfloat16 compiled"], tmp_path)
    assert found["outcome"] == "FELL SHORT"
    assert "compiled" in found["why"]


@pytest.fixture
def compiled_as_they_are(monkeypatch):
    """Layers traced by torch's compiler, without the code that it would generate: that takes minutes and is torch's."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda layer: compiled(layer, backend=lambda graph, _: graph.forward)
    )
    monkeypatch.setattr(correctness, "OTHER_PACKS", 2)


def test_compiled_layers_are_tried_as_in_training(compiled_as_they_are, tmp_path):
    found = check.run_cell("packed against plain", [FAMILY, "bfloat16 compiled"], tmp_path)
    assert found["outcome"] == "ok", found


def test_another_pack_that_is_not_finite_falls_short(compiled_as_they_are, monkeypatch, tmp_path):
    honest = correctness.some_trees
    # a model that has seen no number since
    monkeypatch.setattr(
        correctness,
        "some_trees",
        lambda seed=1: honest(seed) if seed < 3 else spoil(model_of[0]) or honest(seed),
    )
    model_of, made = [], correctness.random_family
    monkeypatch.setattr(correctness, "random_family", lambda family: model_of.append(made(family)) or model_of[0])

    def spoil(model):
        next(model.parameters()).data.fill_(torch.nan)

    found = check.run_cell("packed against plain", [FAMILY, "bfloat16 compiled"], tmp_path)
    assert found == {"outcome": "FELL SHORT", "why": "other pack 2 gives numbers that are not finite"}


def test_a_training_whose_loss_is_not_finite_fails(monkeypatch, tmp_path):
    check.run_cell("random models", ["tiny"], tmp_path)
    assert check.run_cell("training", ["tiny", "refscore", "full"], tmp_path)["outcome"] == "ok"
    load = speed.load_policy

    def spoiled(*arguments):
        policy = load(*arguments)
        next(policy.model.parameters()).data.fill_(torch.nan)
        return policy

    monkeypatch.setattr(speed, "load_policy", spoiled)
    found = check.run_cell("training", ["tiny", "refscore", "full"], tmp_path)
    assert found["outcome"] == "FAILED"
    assert "NotFinite" in found["why"]


def test_a_model_that_is_half_written_is_not_taken_for_one(monkeypatch, tmp_path):
    def stopped(_, directory, *__):
        directory.mkdir()
        (directory / "model-00001-of-00002.safetensors").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(cell, "write_random_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        cell.write_model("tiny", tmp_path)
    with pytest.raises(NotMade, match="tiny"):
        directory_of("tiny", tmp_path)


def test_what_matters_most_comes_first_and_what_cannot_fit_is_not_asked(monkeypatch):
    monkeypatch.setattr(check, "device_kind", lambda: "cuda")
    monkeypatch.setattr(check, "sizes", lambda: cell.FULL)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 * 2**30))
    every = check.cells(list(check.SECTIONS))
    sections = [section for section, _ in every]
    assert sections.index("packed against plain") == 0
    assert max(place for place, section in enumerate(sections) if section == "engine against trainer") < sections.index(
        "scoring"
    )
    assert every[sections.index("scoring")][1] == ("8B", "vllm")
    assert not [arguments for _, arguments in every if arguments[0] == "8B" and arguments[-1] == "full"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 139 * 2**30))
    assert ("training", ("8B", "refscore", "full")) in check.cells(list(check.SECTIONS))


def test_stopped_it_stops_its_cell_and_deletes_its_models(tmp_path):
    command = [sys.executable, "-m", "tests.gpu_check", "--only", "scoring", "--out", str(tmp_path / "page.md")]
    child = subprocess.Popen(command, cwd=check.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    scratch = check.ROOT / "data" / "cache"
    logs = wait_for(lambda: list(scratch.glob("gpu-check-*/log.txt")))
    cell_process = wait_for(lambda: children_of(child.pid))
    child.terminate()
    child.communicate(timeout=60)
    assert child.returncode == 143
    assert not any(runs(number) for number in cell_process)
    assert not any(log.exists() for log in logs)


def wait_for(something, seconds=120):
    until = time.monotonic() + seconds
    while not (found := something()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def children_of(number):
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


def test_a_gradient_that_is_missing_counts():
    logps, gradients = torch.zeros(3), [torch.ones(2), torch.ones(2)]
    assert correctness.differences((logps, gradients), (logps, gradients)) == (0.0, 0.0)
    lost = [torch.ones(2), torch.zeros(2)]
    assert correctness.differences((logps, lost), (logps, gradients))[1] == pytest.approx(1.0)
    assert correctness.differences((logps, gradients), (logps, lost))[1] == 1.0
    for spoiled in ([torch.full((2,), torch.nan), torch.ones(2)], [torch.ones(2), torch.full((2,), torch.nan)]):
        assert math.isnan(correctness.differences((logps, spoiled), (logps, gradients))[1])


@pytest.mark.parametrize(
    ("section", "error", "outcome"),
    [
        ("sampling", RuntimeError(""), {"outcome": "FAILED", "why": "RuntimeError: RuntimeError"}),
        ("training", RuntimeError("CUDA out of memory. Tried"), {"outcome": "out of memory"}),
        ("scoring", RuntimeError("out of memory"), {"outcome": "FAILED", "why": "RuntimeError: out of memory"}),
        ("training", NotMade("8B was not written"), {"outcome": "not run", "why": "8B was not written"}),
    ],
)
def test_an_error_of_one_cell_is_its_outcome(section, error, outcome, monkeypatch, tmp_path):
    def fails(*_):
        raise error

    monkeypatch.setitem(check.SECTIONS, section, fails)
    assert check.run_cell(section, ["tiny"], tmp_path) == outcome


def test_a_model_that_was_not_written_is_not_taken_for_another(tmp_path):
    with pytest.raises(NotMade, match="1B"):
        directory_of("1B", tmp_path)


def test_what_is_left_out_is_said(monkeypatch, tmp_path):
    assert check.fresh(("scoring", ("tiny", "transformers")), tmp_path, 0.0)["why"] == "no time was left"
    monkeypatch.setattr(check, "_installed", lambda _: None)
    for one, names in (
        (("training", ("tiny", "trl-live", "lean")), "trl and bitsandbytes"),
        (("training", ("tiny", "refscore", "lean")), "bitsandbytes"),
        (("scoring", ("tiny", "vllm")), "vllm"),
        (("sampling", ("tiny",)), "vllm"),
    ):
        found = check.fresh(one, tmp_path, 100.0)
        assert found == {"outcome": "not run", "why": f"{names} not installed"}
        assert f"{names} not installed" in check.page([(one, found)])


def stands_in(monkeypatch, tmp_path, code):
    """A process in the place of Python's, which runs the shell's `code`."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_cell_that_hangs_is_stopped_with_all_that_it_started(monkeypatch, tmp_path):
    stands_in(monkeypatch, tmp_path, f"sleep 300 & echo $! > {tmp_path}/left; wait")
    monkeypatch.setattr(check, "CELL_SECONDS", 1)
    found = check.fresh(("scoring", ("tiny", "transformers")), tmp_path, 100.0)
    assert found == {"outcome": "FAILED", "why": "it did not end within 1 s"}
    left = int((tmp_path / "left").read_text())
    until = time.monotonic() + 10
    while time.monotonic() < until and runs(left):
        time.sleep(0.05)
    assert not runs(left)


def runs(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_cell_that_dies_does_not_show_the_last_one_s_result(monkeypatch, tmp_path):
    (tmp_path / "result.json").write_text('{"outcome": "ok"}')
    stands_in(monkeypatch, tmp_path, "echo Segmentation fault; kill -9 $$")
    found = check.fresh(("scoring", ("tiny", "transformers")), tmp_path, 100.0)
    assert found == {"outcome": "FAILED", "why": "Segmentation fault"}


@pytest.mark.parametrize(
    ("outcome", "code"), [("ok", 0), ("not run", 4), ("out of memory", 4), ("FELL SHORT", 4), ("FAILED", 4)]
)
def test_the_exit_code_says_whether_all_is_well(outcome, code, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "fresh", lambda *_: {"outcome": outcome, "why": "a|b\n# c"})
    out = tmp_path / "below" / "check.md"
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(out), "--only", "sampling"])
    assert check.main() == code
    text = out.read_text()
    assert outcome in text
    assert "a\\|b \\# c" in text
    assert ("Reduced, on a CPU" in text) == (check.device_kind() == "cpu")


def test_models_are_written_for_the_sections_that_load_them():
    assert ("random models", ("tiny",)) in check.cells(["sampling"])
    assert {section for section, _ in check.cells(["packed against plain"])} == {"packed against plain"}
