"""`make bench-grpo`: TRL's GRPOTrainer and our policy gradient on the same stored samples, each training in a fresh process.

The embedded model, the demo's openings, eight samples each with VADER's reward. TRL takes them through its `rollout_func`, so that
neither generates: what is timed is the training of a step, with TRL's loss `dapo` and centred advantages. Alternating, the median
of all rounds; memory is the process's peak. Afterwards both policies answer the held-out openings, and their mean rewards are shown.
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

RUN, JUDGE = "bench-grpo", "rule:sentiment=vader:even"
PROMPTS, PER_STEP, STEPS, ROUNDS, RATE = 96, 8, 12, 3, 1e-4
OURS = [
    "train.objective=policy_gradient", f"rollout.judge={JUDGE}", f"rollout.prompts={PROMPTS}", "train.policy_gradient.variant=clip",
    "train.policy_gradient.advantage=centred", "train.policy_gradient.max_kl=null", f"train.max_steps={STEPS}",
    f"train.learning_rate={RATE}", "train.lr_scheduler_type=constant", "train.warmup_ratio=0", "train.save_steps=0",
    f"train.per_device_train_batch_size={PER_STEP}", "train.gradient_accumulation_steps=1", "train.report_to=[]", "train.eval_steps=0",
]  # fmt: skip
# weight of the KL to the reference: without one TRL holds no reference
KINDS = {"ours": 0.0, "TRL": 0.0, "ours, KL": 0.04, "TRL, KL": 0.04}


def command(stage: str, run: str, *settings: str) -> list[str]:
    """A stage of the demo under our settings."""
    sets = [part for setting in (*OURS, *settings) for part in ("--set", setting)]
    return [sys.executable, "-m", "stages.cli", stage, "--config", "demo", "--run", run, *sets]


def ours(run: str, kl: float) -> dict[str, Any]:
    """One training by `refscore train` on a copy of the samples."""
    import polars as pl

    place = ROOT / "data/runs" / run
    subprocess.run([sys.executable, "-m", "stages.cli", "rm", "--yes", run], cwd=ROOT, capture_output=True, check=False)
    place.mkdir(parents=True)
    # beside the samples their held-out prompts, for stage three
    for name in ("rollouts.parquet", "pairs.parquet"):
        (place / name).write_bytes((ROOT / "data/runs" / RUN / name).read_bytes())
    subprocess.run(
        command("train", run, f"train.policy_gradient.kl_coef={kl}"), cwd=ROOT, check=True, capture_output=True
    )
    metrics = pl.read_parquet(place / "metrics.parquet").filter(pl.col("step") > 0)
    return {
        "step": statistics.median(metrics["step_seconds"].drop_nulls().to_list()[2:]),
        "peak_gib": metrics["peak_memory_gib"].max(),
        "losses": metrics["loss"].to_list(),
        "model": str(place / "model"),
    }


def trl(kl: float, to: Path) -> dict[str, Any]:
    """One training by TRL's GRPOTrainer in this process, of the same prompts in the same order."""
    import resource

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # a lazy module

    from pipeline.config.rollouts import PolicyGradientConfig
    from pipeline.config.training import PolicyConfig, TrainConfig
    from pipeline.models.locate import locate
    from pipeline.training.inputs.rollouts import load_rollouts
    from pipeline.training.schedule import pairs_of_step

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds: list[float] = []  # noqa: RUF012  # one trainer a process

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.seconds.append(time.perf_counter() - self.begin)

    rollouts = load_rollouts(ROOT / "data/runs" / RUN / "rollouts.parquet", PolicyGradientConfig())
    train = TrainConfig(per_device_train_batch_size=PER_STEP, gradient_accumulation_steps=1, max_steps=STEPS)
    order = [row for step in range(STEPS) for row in pairs_of_step(step, len(rollouts), train)]
    examples, place = rollouts.one_by_one, iter(order)

    def stored(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        numbers = [number for _ in range(len(prompts) // 8) for number in list(rollouts.of(next(place)))]
        return {
            "prompt_ids": [list(examples.trees[number].trunk) for number in numbers],
            "completion_ids": [list(examples.trees[number].branches[0]) for number in numbers],
            "logprobs": [examples.logps(number, "logps").tolist() for number in numbers],
            "stored_reward": [float(rollouts.rewards[number]) for number in numbers],
        }

    def reward(completions: list[str], stored_reward: list[float], **_: object) -> list[float]:
        return stored_reward

    base = str(locate(PolicyConfig()))
    clock, begun = Clock(), time.perf_counter()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(to), bf16=torch.ops.mkldnn._is_mkldnn_bf16_supported(), use_cpu=True, max_steps=STEPS, beta=kl,
            per_device_train_batch_size=8 * PER_STEP, num_generations=8, gradient_accumulation_steps=1, steps_per_generation=1,
            learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, loss_type="dapo", epsilon=0.2, epsilon_high=0.28,
            scale_rewards="none", max_completion_length=32, logging_steps=1, save_strategy="no", report_to="none",
            gradient_checkpointing=False, shuffle_dataset=False, max_grad_norm=1.0, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * len(order)),
        processing_class=AutoTokenizer.from_pretrained(base),
        rollout_func=stored,
        callbacks=[clock],
    )  # fmt: skip
    ready = time.perf_counter() - begun
    trainer.train()
    trainer.save_model(str(to / "model"))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "step": statistics.median(clock.seconds[2:]),
        "ready": ready,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": losses,
        "model": str(to / "model"),
    }


def one(kind: str) -> dict[str, Any]:
    """A training of one kind, TRL's in a process of its own."""
    if kind.startswith("ours"):
        return ours(f"{RUN}-{'kl' if KINDS[kind] else 'plain'}", KINDS[kind])
    to = ROOT / "data/cache" / f"{RUN}-{'kl' if KINDS[kind] else 'plain'}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.grpo", "--trl", str(KINDS[kind]), str(to)],
        cwd=ROOT, env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"TRL's training failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rewards(found: dict[str, list[dict[str, Any]]]) -> None:
    """Mean true reward of held-out openings for both policies and the reference, four samples each at temperature 1."""
    settings = [f"generate.models={json.dumps({'trl': found['TRL'][-1]['model']})}", f"judge=[{json.dumps(JUDGE)}]"]
    subprocess.run(command("eval", f"{RUN}-plain", *settings, "generate.kl_samples=4"), cwd=ROOT, check=True)
    costs = json.loads((ROOT / "data/runs" / f"{RUN}-plain" / "eval.json").read_text()).get("cost", {})
    print("\n| policy | true reward, held out | KL, nats per response |\n| --- | ---: | ---: |")
    for model, cost in costs.items():
        reward, kl = cost["reward"][JUDGE], cost.get("kl") or {}
        low, high = reward.get("low"), reward.get("high")
        print(f"| {model} | {reward['mean']:.3f} [{low:.3f}, {high:.3f}] | {kl.get('mean', 0):.2f} |")


def siblings() -> None:
    """Tokens that the trainer reads, and seconds of a step, of eight samples of one prompt: together, and as eight sequences."""
    import numpy as np
    import torch

    from pipeline.config.training import PolicyConfig
    from pipeline.forward.logps import forward_of
    from pipeline.forward.trees import Tree
    from pipeline.models.load import load_causal_lm
    from pipeline.models.locate import locate

    model = load_causal_lm(locate(PolicyConfig()), PolicyConfig(), torch.float32).train()
    draw = np.random.default_rng(0)
    print(
        "| prompt | sample | tokens read | as eight sequences | seconds of a step | as eight sequences | times as fast |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for prompt, sample in ((16, 32), (128, 32), (512, 32), (512, 256)):
        tree = Tree(
            draw.integers(100, 9000, prompt).tolist(),
            tuple(draw.integers(100, 9000, sample).tolist() for _ in range(8)),
        )
        seconds: dict[str, list[float]] = {"tree": [], "separate": []}
        tokens = {}
        for number in range(4):
            for layout, taken in seconds.items():
                forward = forward_of(model, layout, torch.bfloat16)
                tokens[layout] = len(tree) if layout == "tree" else 8 * (prompt + sample - 1)
                begun = time.perf_counter()
                (-torch.cat(forward([tree])[0]).mean()).backward()  # type: ignore[no-untyped-call]
                # the first fills caches
                if number:
                    taken.append(time.perf_counter() - begun)
                model.zero_grad()
        medians = {layout: statistics.median(taken) for layout, taken in seconds.items()}
        print(
            f"| {prompt} | {sample} | {tokens['tree']:,} | {tokens['separate']:,} | {medians['tree']:.2f} | "
            f"{medians['separate']:.2f} | {medians['separate'] / medians['tree']:.1f} |",
            flush=True,
        )


def main() -> None:
    """Make the samples, train in turns, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--siblings", action="store_true", help="only what eight samples of one prompt take")
    parser.add_argument("--trl", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.siblings:
        siblings()
        return
    if given.trl:
        print(json.dumps(trl(float(given.trl[0]), Path(given.trl[1]))))
        return
    subprocess.run(command("rollout", RUN), cwd=ROOT, check=True)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in given.kinds}
    for number in range(given.rounds):
        for kind in given.kinds:
            found[kind].append(one(kind))
            last = found[kind][-1]
            print(f"round {number + 1}  {kind:10} {last['step']:.2f} s a step, {last['peak_gib']:.2f} GiB", flush=True)
    print("\n| training | seconds per step | peak GiB | first losses |\n| --- | ---: | ---: | --- |")
    for kind, runs in found.items():
        step = statistics.median(run["step"] for run in runs)
        losses = ", ".join(f"{loss:+.4f}" for loss in runs[-1]["losses"][:3])
        print(f"| {kind} | {step:.2f} | {max(run['peak_gib'] for run in runs):.2f} | {losses} |")
    if "ours" in found and "TRL" in found:
        rewards(found)
    print()
    subprocess.run([sys.executable, "-m", "tests.benchmarks.grpo", "--siblings"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
