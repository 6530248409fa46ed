"""Our trainer against TRL's DPOTrainer, the same pairs, model, batch, precision and steps: `make bench-train`.

Every measurement is a fresh process, and the contestants take turns, so that a noisy machine disturbs all of them alike.
Step times leave loading out (TRL's: its own `train_runtime`, precomputation apart); peak memory is the whole process's, on a
GPU the allocator's. TRL gets the very token ids that our trainer reads, and its own default of gradient checkpointing is
off, as it is in ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

from tests.benchmarks.trl_training import BETA, RATE, embedded, train_with_trl

ROOT = Path(__file__).parent.parent.parent
HH = ROOT.parent / "shared" / "data" / "hh_harmless_400.jsonl"
DEMO = ROOT / "data" / "bad_rule" / "train.jsonl"
CONTESTANTS = ("refscore", "trl-live", "trl-precomputed")


def main() -> None:
    """Run the contestants in turn and print the table; with --one, be TRL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HH if HH.is_file() else DEMO)
    parser.add_argument("--model", help="a directory in Hugging Face layout; default: the embedded model")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="pairs in a step")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--one", choices=CONTESTANTS[1:], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_trl(options)))
        return
    with tempfile.TemporaryDirectory() as where:
        os.chdir(ROOT)
        options.model = str(Path(options.model).resolve() if options.model else embedded())
        config = prepare(options, Path(where))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in options.contestants}
        for turn in range(options.repeat):
            for name in options.contestants:
                one = run_refscore(config, turn) if name == "refscore" else in_fresh_process(options, name, where)
                found[name].append(one)
                figures = "  ".join(f"{key} {value:.2f}" for key, value in one.items())
                print(f"turn {turn + 1}  {name:16} {figures}", flush=True)
        show(options, found)


def prepare(options: argparse.Namespace, where: Path) -> Path:
    """The configuration file of the experiment, its reference scores made."""
    config = {
        "data": {"path": str(options.data.resolve()), "max_rows": options.pairs, "eval_fraction": 0.0},
        "reference": {"model": options.model, "engine": "transformers"},
        "policy": {"model": options.model},
        "train": {
            "beta": BETA, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
            "per_device_train_batch_size": options.batch, "gradient_accumulation_steps": 1,
            "max_steps": options.pairs // options.batch, "save_steps": 0,
        },
    }  # fmt: skip
    path = where / "experiment.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command(path, "precompute", "scores")
    (where / "pairs.parquet").write_bytes((where / "data/runs/scores/pairs.parquet").read_bytes())
    return path


def run_refscore(config: Path, turn: int) -> dict[str, float]:
    """`refscore train` in a fresh process; its step times from metrics.parquet."""
    import polars as pl

    begun = time.monotonic()
    peak = command(config, "train", f"turn{turn}")
    wall = time.monotonic() - begun
    metrics = pl.read_parquet(config.parent / f"data/runs/turn{turn}/metrics.parquet").drop_nulls("step_seconds")
    if os.environ.get("REFSCORE_GPU"):
        peak = float(metrics["peak_memory_gib"].max())  # type: ignore[arg-type]
    return {"seconds": metrics["step_seconds"].sum(), "peak_gib": peak, "wall": wall}


def command(config: Path, stage: str, run: str) -> float:
    """Run a stage in a fresh process; its peak resident memory in GiB. Its output is shown only if it fails."""
    return measured([sys.executable, "-m", "stages.cli", stage, "--config", str(config), "--run", run], config.parent)[
        1
    ]


def measured(arguments: list[str], where: Path) -> tuple[str, float]:
    """Output and peak resident GiB of a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    child = subprocess.Popen(
        arguments, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} failed:\n{output}")
    return output, usage.ru_maxrss / 2**20


def in_fresh_process(options: argparse.Namespace, name: str, where: str) -> dict[str, float]:
    """One TRL run; resident memory as the system saw it, unless it ran on a GPU."""
    begun = time.monotonic()
    arguments = [sys.executable, "-m", "tests.benchmarks.training", "--one", name, "--model", options.model]
    output, peak = measured([*arguments, "--batch", str(options.batch), "--pairs", str(options.pairs)], Path(where))
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return {"peak_gib": peak, **found, "wall": time.monotonic() - begun}


def run_trl(options: argparse.Namespace) -> dict[str, float]:
    """TRL on the token ids of pairs.parquet, with a live reference or its own precomputed scores."""
    import polars as pl

    rows = pl.read_parquet("pairs.parquet").select("prompt_ids", "chosen_ids", "rejected_ids").to_dicts()
    precomputed, steps = options.one == "trl-precomputed", options.pairs // options.batch
    run = train_with_trl(options.model, rows, batch=options.batch, steps=steps, precomputed=precomputed)
    found = {"seconds": sum(run.steps), "prepared": run.prepared}
    return {**found, "peak_gib": run.peak_gib} if run.peak_gib else found


def show(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    """The table: medians over the turns, and ratios to ours."""
    steps = options.pairs // options.batch
    print(f"\n{options.data.name}, {options.pairs} pairs, {steps} steps of {options.batch}, bfloat16 autocast, medians")
    print(f"{'':18}{'s / step':>10}{'peak GiB':>10}{'times ours':>12}{'our memory':>12}")
    medians = {
        name: {key: median(turn[key] for turn in turns) for key in ("seconds", "peak_gib")}
        for name, turns in found.items()
    }
    ours = medians.get("refscore")
    for name, values in medians.items():
        text = f"{name:18}{values['seconds'] / steps:10.2f}{values['peak_gib']:10.2f}"
        if ours and name != "refscore":
            text += f"{values['seconds'] / ours['seconds']:12.2f}{ours['peak_gib'] / values['peak_gib']:12.2f}"
        print(text)


if __name__ == "__main__":
    main()
