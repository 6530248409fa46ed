"""A training killed at every step of writing a checkpoint resumes from a whole one."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from tests.faults.conftest import PREAMBLE, build
from tests.forked import run

SOURCE = (Path(__file__).parent.parent.parent / "pipeline" / "training" / "checkpoint.py").read_text()
POINTS = re.findall(r'reached\("(checkpoint: [^"]+)"\)', SOURCE)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path, case, point):
    root = tmp_path / "checkpoints"
    save_checkpoint(root, 2, "t", *build(2.0), keep=1)
    saving = "from pipeline.training.checkpoint import save_checkpoint\ndie_at(sys.argv[2])\nsave_checkpoint(Path(sys.argv[1]), 4, 't', *build(4.0), keep=1)"
    done = run(tmp_path, PREAMBLE + saving, root, point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = newest_checkpoint(root)
    assert newest.step in (2, 4)
    model, optimizer = build(0.0)
    load_checkpoint(newest, model, optimizer)
    expected, _ = build(float(newest.step))
    assert all((a == b).all() for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    save_checkpoint(root, 6, "t", *build(6.0), keep=1)
    assert [path.name for path in root.iterdir()] == ["step_000006"]
    case("SIGKILL while writing a checkpoint")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, case, file, damage):
    save_checkpoint(tmp_path, 2, "t", *build(2.0), keep=2)
    path = save_checkpoint(tmp_path, 4, "t", *build(4.0), keep=2) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-3])
    assert newest_checkpoint(tmp_path).step == 2
    case("checkpoint damaged")
