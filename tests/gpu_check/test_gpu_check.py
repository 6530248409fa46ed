"""The check for GPUs must be able to fail, must notice that kernels were not run, and must say what it left out."""

import math
import os
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
from tests.gpu_check import __main__ as check
from tests.gpu_check import correctness
from tests.gpu_check.cell import NotMade, directory_of

FAMILY = "Mistral, window of 160"


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
    for cell, names in (
        (("training", ("tiny", "trl-live", "lean")), "trl and bitsandbytes"),
        (("training", ("tiny", "refscore", "lean")), "bitsandbytes"),
        (("scoring", ("tiny", "vllm")), "vllm"),
        (("sampling", ("tiny",)), "vllm"),
    ):
        found = check.fresh(cell, tmp_path, 100.0)
        assert found == {"outcome": "not run", "why": f"{names} not installed"}
        assert f"{names} not installed" in check.page([(cell, found)])


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
