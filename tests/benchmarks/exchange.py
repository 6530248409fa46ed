"""`make bench-trl`: TRL's DPOTrainer from our stored scores against TRL's own precomputation, each in a fresh process.

Both train the embedded model in float32 on the same token ids in the same order: the demo's pairs, scored in float32. "TRL
precomputes" reads no score of ours. Alternating; the median of the rounds. Memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

RUN = "bench-trl"
EXPORT = Path("data/cache/bench-trl")
STEPS, BATCH, ROUNDS = 12, 4, 3
KINDS = {"own": "TRL precomputes", "stored": "stored scores"}


def prepare() -> None:
    """Score the demo's pairs, if the store lacks them, and export them."""
    for arguments in (
        ["precompute", "--config", "demo", "--run", RUN, "--set", "reference.dtype=float32"],
        ["export", "--run", RUN, "--format", "trl", "--to", str(EXPORT)],
    ):
        subprocess.run([sys.executable, "-m", "stages.cli", *arguments], cwd=ROOT, check=True)


def one(kind: str) -> dict[str, Any]:
    """One training in this process."""
    import resource

    sys.path.insert(0, str(ROOT / EXPORT))
    import torch
    from datasets import load_dataset
    from stored_reference import StoredReferenceTrainer  # type: ignore[import-not-found]  # lies beside the data
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # a lazy module

    from pipeline.config.training import PolicyConfig
    from pipeline.models.locate import locate

    class Own(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: object, **__: object) -> Any:
            return dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends = [0.0]

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(time.perf_counter() - self.begin)

    base = str(locate(PolicyConfig()))
    # a cache of its own, or the second round would find what the first one computed
    cache = ROOT / "data/cache/bench-trl-datasets" / f"{kind}-{os.getpid()}"
    data = load_dataset(str(ROOT / EXPORT), cache_dir=str(cache))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = DPOConfig(
        output_dir=str(cache), precompute_ref_log_probs=True, max_length=None, beta=0.1, bf16=False, max_steps=STEPS,
        per_device_train_batch_size=BATCH, learning_rate=1e-6, logging_steps=1, report_to="none", save_strategy="no",
        gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    clock, start = Clock(), time.perf_counter()
    trainer = {"own": Own, "stored": StoredReferenceTrainer}[kind](
        model=model, args=settings, train_dataset=data["train"], processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[clock],
    )  # fmt: skip
    ready = time.perf_counter() - start
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "pairs": len(data["train"]),
        "prepared": ready,
        "step": statistics.median(clock.ends[2:]),
        "losses": losses,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "sums": [trainer.train_dataset[name][:200] for name in ("ref_chosen_logps", "ref_rejected_logps")],
    }


def main() -> None:
    """Prepare, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=KINDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(one(arguments.one)))
        return
    prepare()
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.exchange", "--one", kind], cwd=ROOT, stdout=subprocess.PIPE,
                text=True, check=True,
            )  # fmt: skip
            found[kind].append(json.loads(done.stdout.split("RESULT ")[1]))
    pairs = found["own"][0]["pairs"]
    lines = [
        f"| {pairs} pairs, steps of {BATCH} | before the first step | a step | first losses | peak memory |",
        "|---|---:|---:|---|---:|",
    ]
    for kind, shown in KINDS.items():
        prepared, step, peak = (
            statistics.median(run[name] for run in found[kind]) for name in ("prepared", "step", "peak_gib")
        )
        losses = ", ".join(f"{loss:.5f}" for loss in found[kind][0]["losses"][:3])
        lines.append(f"| {shown} | {prepared:.1f} s | {step:.2f} s | {losses} | {peak:.2f} GiB |")
    apart = max(
        abs(ours - theirs)
        for side in (0, 1)
        for ours, theirs in zip(found["stored"][0]["sums"][side], found["own"][0]["sums"][side], strict=True)
    )
    lines.append(f"\nReference log-probabilities differ by at most {apart:.2g} nats per response (first 200 pairs).")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
