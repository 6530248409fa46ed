"""`make bench-memory-host`: does any machine hold a whole model? Memory of all processes of a training together, by their number.

A random model of a billion weights in bfloat16 with AdamW is loaded, trained for two steps, saved and exported in one process, and
in several with gloo, on this machine. Every tenth of a second the proportional set sizes (PSS: pages that processes share count
once) of all processes are added up; `without files` leaves out pages that are files', which the system takes back when it likes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.shapes import LLAMA_1B
from tests.conftest import ROOT, experiment, make_tiny_tokenizer, preference_rows, refscore_here, write_rows

GIB = 2**30
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "eval_steps": 0, "precision": "bfloat16",
         "gradient_checkpointing": True, "tokens_per_batch": 256, "report_to": []}  # fmt: skip


def make_model(directory: Path, vocabulary: int) -> int:
    """A Llama of a billion random weights in bfloat16, and a tokenizer of few words; returns how many weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    named = {key: value for key, value in LLAMA_1B.items() if key not in ("architectures", "model_type")}
    shape = {**named, "vocab_size": vocabulary}
    model = LlamaForCausalLM(
        LlamaConfig(**{**shape, "dtype": "bfloat16", "eos_token_id": tokenizer.eos_token_id})
    ).bfloat16()
    torch.manual_seed(0)
    model.save_pretrained(directory, max_shard_size="1GB")
    return sum(weight.numel() for weight in model.parameters())


def descendants(parent: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found = [parent]
    for process in found:
        found += parents.get(process, [])
    return found


def held(process: int) -> tuple[int, int]:
    """Bytes of a process: its proportional set size, and that without files."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("Pss", 0), sizes.get("Pss", 0) - sizes.get("Pss_File", 0)


def measure(where: Path, ranks: int) -> dict[str, float]:
    """The peaks of a training in so many processes, GiB, and its seconds."""
    run = f"by-{ranks}"
    (where / "data/runs" / run).mkdir(parents=True)
    shutil.copy(where / "data/runs/scored/pairs.parquet", where / "data/runs" / run)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.training.many", f"experiment={run}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(max(1, 2 // ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = time.monotonic()
    training = subprocess.Popen(command, cwd=where, env=environment)
    whole = without = 0
    while training.poll() is None:
        sizes = [held(process) for process in descendants(training.pid)]
        whole, without = max(whole, sum(size for size, _ in sizes)), max(without, sum(size for _, size in sizes))
        time.sleep(0.1)
    if training.returncode != 0:
        raise SystemExit(f"the training in {ranks} processes failed")
    return {"ranks": ranks, "gib": whole / GIB, "without_files": without / GIB, "seconds": time.monotonic() - started}


def main() -> None:
    """Print a table row per number of processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--vocabulary", type=int, default=32768, help="each process holds its embeddings while it reads a pass"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        weights = make_model(where / "model", chosen.vocabulary)
        os.chdir(where)
        data = write_rows(where / "d.jsonl", preference_rows(16))
        sections = {"policy": {"dtype": "bfloat16", "save_dtype": "base", "max_shard_size": "500MB"}, "train": TRAIN}
        experiment(where, where / "model", data, **sections)
        refscore_here(where, "precompute", "--config", "experiment.yaml", "--run", "scored")
        print(f"{weights / 1e9:.2f} billion weights")
        print("| processes | GiB together | by one process's | without files | by one process's | seconds |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        rows: list[dict[str, float]] = []
        for ranks in chosen.ranks:
            rows.append(row := measure(where, ranks))
            shares = [row[name] / rows[0][name] for name in ("gib", "without_files")]
            print(
                f"| {ranks} | {row['gib']:.2f} | {shares[0]:.2f} | {row['without_files']:.2f} | {shares[1]:.2f} "
                f"| {row['seconds']:.0f} |",
                flush=True,
            )
            shutil.rmtree(where / "data/runs" / f"by-{ranks}")
        print(json.dumps(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
