"""`make bench-balance`: how evenly the tokens of a step are shared out among processes, on real pairs. No model runs.

Of every step the tokens of the process with the most, by the mean over processes: what a step waits for. Passes that count nothing
are those that a process makes up to keep pace with the gathering of weights.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.artifacts.tables import arrays_of
from pipeline.config.experiment import Config
from pipeline.config.files import load_config
from pipeline.forward.trees import Tree, merge
from pipeline.precompute.plan import make_plan
from pipeline.training.parallel.plan import passes, rows_by_rank, tokens_of
from pipeline.training.parallel.world import World
from pipeline.training.schedule import pairs_of_step

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
STEPS = 50


def main() -> None:
    """Print a row per data set, pairs in a step and number of processes."""
    print(
        "| pairs | pairs in a step | processes | largest by mean, median | worst of 50 steps | passes that count nothing |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    sources = {"demo": [], "HH, harmless": [f"data.path={path}" for path in sorted(SHARED.glob("*hh*"))[:1]]}
    for name, overrides in sources.items():
        if name != "demo" and not overrides:
            print(f"{name}: no ../shared/data beside this checkout", file=sys.stderr)
            continue
        config = load_config("demo", [*overrides, "data.eval_path=null", "data.max_length=null"] if overrides else [])
        trees = _trees(config)
        for size, pairs_in_a_step in ((2, 64), (8, 64), (8, 256), (16, 512)):
            _row(name, config, trees, size, pairs_in_a_step)


def _trees(config: Config) -> list[Tree]:
    found = []
    for _, table in make_plan(config).pairs.groups(["prompt_ids", "chosen_ids", "rejected_ids"]):
        columns = [arrays_of(table, column) for column in table.column_names]
        found += [
            Tree(prompt.tolist(), (one.tolist(), other.tolist())) for prompt, one, other in zip(*columns, strict=True)
        ]
    return found


def _row(name: str, config: Config, trees: Sequence[Tree], size: int, in_a_step: int) -> None:
    pairs: Any = SimpleNamespace(trees=trees)
    reads: Any = SimpleNamespace(tokens=lambda given: sum(map(len, merge(given)[0])))
    train = config.train.model_copy(
        update={
            "per_device_train_batch_size": in_a_step,
            "gradient_accumulation_steps": 1,
            "tokens_per_batch": 8192,
            "max_steps": STEPS,
        }
    )
    ratios, idle, made = [], 0, 0
    for step in range(STEPS):
        rows = pairs_of_step(step, len(trees), train)
        tokens = [tokens_of(pairs, part) for part in rows_by_rank(pairs, rows, size)]
        ratios.append(max(tokens) / statistics.mean(tokens))
        for rank in range(size):
            counts = [count for _, count in passes(reads, pairs, rows, train, World(rank, size))]
            idle, made = idle + counts.count(False), made + len(counts)
    print(
        f"| {name} ({len(trees)}) | {in_a_step} | {size} | {statistics.median(ratios):.3f} | {max(ratios):.3f} | {idle / made:.1%} |"
    )


if __name__ == "__main__":
    main()
