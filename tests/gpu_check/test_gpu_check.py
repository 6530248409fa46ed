"""The check for GPUs must be able to fail, and must say what it left out."""

import pytest
import torch

from tests.gpu_check import __main__ as check
from tests.gpu_check import correctness

FAMILY = "Mistral, window of 160"


def test_a_spoiled_pack_falls_short(monkeypatch, tmp_path):
    honest = correctness.forward_of

    def spoiled(model, *options):
        forward = honest(model, *options)
        return lambda trees: [[logps + 0.01 for logps in tree] for tree in forward(trees)]

    monkeypatch.setattr(correctness, "forward_of", spoiled)
    found = check.run_cell("packed against plain", [FAMILY, "float32"], tmp_path)
    assert found["outcome"] == "FELL SHORT"
    assert "1.0e-02" in found["why"]


def test_a_gradient_that_is_missing_counts(monkeypatch):
    logps, gradients = torch.zeros(3), [torch.ones(2), torch.ones(2)]
    assert correctness.differences((logps, gradients), (logps, gradients)) == (0.0, 0.0)
    lost = [torch.ones(2), torch.zeros(2)]
    assert correctness.differences((logps, lost), (logps, gradients))[1] == pytest.approx(1.0)
    assert correctness.differences((logps, gradients), (logps, lost))[1] == 1.0


def test_an_error_of_one_cell_is_its_outcome(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(check.SECTIONS, "sampling", lambda *_: 1 / 0)
    assert check.run_cell("sampling", ["tiny"], tmp_path) == {
        "outcome": "FAILED",
        "why": "ZeroDivisionError: division by zero",
    }
    assert "Traceback" in capsys.readouterr().err


def test_what_is_left_out_is_said(monkeypatch, tmp_path):
    assert check.fresh("scoring", ("tiny", "transformers"), tmp_path, 0.0)["why"] == "no time was left"
    monkeypatch.setattr(check, "_installed", lambda _: None)
    for section, arguments, name in (
        ("training", ("tiny", "trl-live", "full"), "trl"),
        ("scoring", ("tiny", "vllm"), "vllm"),
        ("sampling", ("tiny",), "vllm"),
    ):
        found = check.fresh(section, arguments, tmp_path, 100.0)
        assert found == {"outcome": "not run", "why": f"{name} is not installed"}
        assert f"{name} is not installed" in check.page([(section, arguments, found)])


@pytest.mark.parametrize(("outcome", "code"), [("ok", 0), ("not run", 0), ("FELL SHORT", 4), ("FAILED", 4)])
def test_the_exit_code_says_whether_all_is_well(outcome, code, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "fresh", lambda *_: {"outcome": outcome})
    out = tmp_path / "check.md"
    monkeypatch.setattr("sys.argv", ["gpu_check", "--out", str(out), "--only", "sampling"])
    assert check.main() == code
    assert outcome in out.read_text()
    assert "Reduced, on a CPU" in out.read_text() or check.device_kind() == "cuda"
