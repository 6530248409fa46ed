"""Wall time and peak memory of each stage on part of the demo, every stage in a fresh process: `make bench`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAIRS = 64


def main() -> None:
    """Run the stages one after the other on the first PAIRS pairs and print a table."""
    options = [
        "--config", str(ROOT / "pipeline/presets/demo.yaml"), "--run", "bench",
        "--set", f"data.path={ROOT}/data/demo/train.jsonl", "--set", f"data.eval_path={ROOT}/data/demo/eval.jsonl",
        "--set", f"data.max_rows={PAIRS}", "--set", "train.eval_steps=0", "--set", "generate.max_prompts=16",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        # the model conversion is no part of a stage
        (Path(where) / "data").mkdir()
        if (ROOT / "data/models").is_dir():
            (Path(where) / "data/models").symlink_to(ROOT / "data/models")
        print(f"{PAIRS} train and {PAIRS} eval pairs of the demo, {os.cpu_count()} processors\n")
        print(f"{'stage':24}{'seconds':>10}{'peak GiB':>10}")
        for name, command in (
            ("precompute --plan", ["precompute", "--plan"]),
            ("precompute", ["precompute"]),
            ("precompute, all stored", ["precompute"]),
            ("train", ["train"]),
            ("eval", ["eval"]),
        ):
            seconds, peak = measure([sys.executable, "-m", "stages.cli", *command, *options], where)
            print(f"{name:24}{seconds:10.1f}{peak:10.2f}", flush=True)


def measure(command: list[str], where: str) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of one command; its output is shown only if it fails.

    Linux starts a child's peak at what its parent holds, so this process must stay small: what else there is to do is done
    in processes of its own.
    """
    begun = time.monotonic()
    child = subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        sys.exit(f"the peak of {' '.join(command)} cannot be told: this process has been as large")
    return time.monotonic() - begun, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
