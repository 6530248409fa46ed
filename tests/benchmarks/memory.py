"""Peak memory of stage one against the number of rows, with a tiny model: `make bench-memory`.

Synthetic preference rows in JSONL, stage one's own command in a fresh process, its peak resident memory. The second run of
each size finds every sequence in the store.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.stages import ROOT, measure

MAKE_MODEL = "import sys, pathlib, tests.conftest as c; c.make_tiny_model(pathlib.Path(sys.argv[1]))"


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    parser.add_argument("--engine", default="transformers", choices=["vllm", "transformers"])
    options = parser.parse_args()
    print(f"engine {options.engine}")
    print(f"{'rows':>10}{'scoring, s':>14}{'peak GiB':>12}{'all stored, s':>16}{'peak GiB':>12}")
    with tempfile.TemporaryDirectory() as where:
        model = Path(where) / "model"
        subprocess.run([sys.executable, "-c", MAKE_MODEL, model], check=True, cwd=ROOT, capture_output=True)
        for rows in options.rows:
            data = write(Path(where) / f"{rows}.jsonl", rows)
            config = Path(where) / f"{rows}.yaml"
            config.write_text(
                f"data: {{path: {data}, max_length: 128}}\npolicy: {{model: {model}}}\n"
                f"reference: {{model: {model}, engine: {options.engine}, store: {where}/store-{rows}}}\n"
            )
            command = [sys.executable, "-m", "stages.cli", "precompute", "--config", str(config)]
            (Path(where) / "stages").unlink(missing_ok=True)
            for package in ("stages", "pipeline"):
                if not (Path(where) / package).exists():
                    (Path(where) / package).symlink_to(ROOT / package)
            scoring, again = measure(command, where), measure(command, where)
            print(f"{rows:10,}{scoring[0]:14.1f}{scoring[1]:12.3f}{again[0]:16.1f}{again[1]:12.3f}", flush=True)


def write(path: Path, rows: int) -> Path:
    """Rows with prompts and responses of a few words, no two alike."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "how", "do", "I", "cook", "rice", "well", "today"]

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    with path.open("w") as file:
        for row in range(rows):
            one = {"prompt": f"{row} {some(4, 10)}?", "chosen": f"{some(2, 8)}.", "rejected": f"{some(2, 8)}!"}
            file.write(json.dumps(one) + "\n")
    return path


if __name__ == "__main__":
    main()
