"""`make bench-pairs`: what a training's pairs cost: time to open, resident memory per pair, time to make a step's trees.

Synthetic pairs of 60 prompt and 2 x 70 response tokens, with scores. Each figure is of a fresh process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import list_column, parquet_writer
from pipeline.training.inputs.pairs import load_pairs

_GROUP = 8192
_LENGTHS = {"prompt": 60, "chosen": 70, "rejected": 70}


def build(path: Path, number: int) -> None:
    """Write `number` pairs of the training split."""
    draw = np.random.default_rng(0)
    with parquet_writer(path, PAIRS, {"scored": True}) as writer:
        for first in range(0, number, _GROUP):
            rows = min(_GROUP, number - first)
            columns: dict[str, pa.Array] = {
                "pair_id": pa.array([f"{first + row:032x}" for row in range(rows)]),
                "split": pa.array(["train"] * rows),
            }
            for side, length in _LENGTHS.items():
                ids = draw.integers(1, 49152, (rows, length), dtype=np.int32)
                columns[f"{side}_ids"] = list_column(list(ids), pa.list_(pa.int32()))
                if side != "prompt":
                    logps = -draw.random((rows, length), dtype=np.float32)
                    columns[f"ref_{side}_token_logps"] = list_column(list(logps), pa.list_(pa.float32()))
                    columns[f"ref_{side}_logps"] = pa.array(logps.sum(axis=1, dtype=np.float64))
            missing = {name: pa.nulls(rows, PAIRS.field(name).type) for name in PAIRS.names if name not in columns}
            writer.write_table(pa.table({name: {**columns, **missing}[name] for name in PAIRS.names}, schema=PAIRS))


def resident() -> int:
    """Bytes of this process that are in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def measure(path: Path, number: int) -> None:
    """Open the pairs and print the figures."""
    before, begun = resident(), time.monotonic()
    pairs = load_pairs(path, "train")
    opened, after = time.monotonic() - begun, resident()
    begun = time.monotonic()
    rows = np.random.default_rng(1).permutation(number)[:64]
    tokens = sum(len(pairs.trees[row]) + len(pairs.ref_chosen_token_logps[row]) for row in rows.tolist())
    step = time.monotonic() - begun
    print(
        f"| {number:,} | {opened:.1f} s | {after / 2**30:.2f} GiB | {(after - before) / number:.0f} | {step * 1000:.1f} ms |"
    )
    assert tokens > 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int)
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    if options.one:
        measure(options.path, options.one)
        return
    print(
        "| pairs | open | resident then | more than before, bytes per pair | trees of 64 pairs |\n|--:|--:|--:|--:|--:|"
    )
    for number in options.numbers:
        with tempfile.TemporaryDirectory() as where:
            path = Path(where) / "pairs.parquet"
            subprocess.run(
                [sys.executable, "-c", f"from pathlib import Path; from tests.benchmarks.pairs import build; build(Path({str(path)!r}), {number})"],
                check=True,
            )  # fmt: skip
            arguments = ["--one", str(number), "--path", str(path)]
            subprocess.run([sys.executable, "-m", "tests.benchmarks.pairs", *arguments], check=True)


if __name__ == "__main__":
    main()
