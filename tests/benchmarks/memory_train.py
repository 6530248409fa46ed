"""`make bench-memory-train`: what a training step holds at its peak, ours and TRL's, simulated; and the simulation against memory.

Simulated: torch's FakeTensorMode and MemTracker on tensors without numbers (`pipeline.planning.training`), so without the
fragmentation of an allocator and without CUDA's context. `T` tokens are read in one forward pass, half of them response tokens.
TRL reads the same number of tokens as two sequences, which leaves out that it reads a prompt twice. "fp32" are float32 weights
under bfloat16 autocast with AdamW; "lean" is what each has: TRL bfloat16 weights, 8-bit AdamW, a loss that makes no whole
logits, gradient checkpointing and offloading; ours the same and the optimizer's step inside the backward pass. TRL's reference
has its policy's dtype. TRL 1.13 can have the loss without whole logits neither with precomputed scores nor with offloaded activations:
its lean and LoRA rows are given both all the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.config.experiment import Config
from pipeline.planning.numberless import loss_of, model_of, optimizer_of
from pipeline.planning.outlook import of_process
from pipeline.planning.training import Held, held_by, simulate_step, with_states
from tests.benchmarks.shapes import SHAPES

GIB = 2**30
LEAN = {"policy.dtype": "bfloat16", "train.optimizer": "adamw_8bit", "train.activation_offloading": True,
        "train.max_grad_norm": None, "train.optimizer_in_backward": True}  # fmt: skip
LORA = {"policy.lora": {"r": 16}, "train.activation_offloading": True}
MODES = {"fp32": {}, "lean": LEAN, "LoRA": LORA}


def config_of(settings: dict[str, Any]) -> Config:
    """The configuration of a training on a GPU."""
    content: dict[str, dict[str, Any]] = {
        "data": {"path": "pairs.jsonl"},
        "policy": {},
        "train": {"precision": "bfloat16"},
    }
    for name, value in settings.items():
        section, field = name.split(".")
        content[section][field] = value
    return Config.model_validate(content)


def simulate_trl(config: Config, base: Path, tokens: int, *, live: bool, lean: bool) -> Held:
    """TRL's step (`DPOTrainer._compute_loss` of 1.13): two sequences, the logits of all their tokens, a reference beside it."""
    from trl.trainer.utils import selective_log_softmax

    settings = {"train.optimizer_in_backward": False, "train.max_grad_norm": 1.0}
    theirs = config.model_copy(
        update={
            "train": config.train.model_copy(update={name.split(".")[1]: value for name, value in settings.items()})
        }
    )
    with torch._subclasses.FakeTensorMode():
        policy, layer = model_of(theirs, base, "cuda")
        optimizer = with_states(optimizer_of(policy, theirs), policy)
        reference = model_of(theirs, base, "cuda")[0].eval() if live and theirs.policy.lora is None else None
        if reference is not None:
            for parameter in reference.parameters():
                parameter.requires_grad_(False)

        def logps(model: Any) -> torch.Tensor:
            ids = torch.zeros(2, tokens // 2, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(
                    input_ids=ids, attention_mask=torch.zeros(2, 1, 1, 1), position_ids=ids, use_cache=False
                ).logits
            return selective_log_softmax(logits[:, :-1], ids[:, 1:])

        def forward_and_backward() -> None:
            if lean:  # Liger's fused loss, as ours: logits in chunks, of response tokens alone
                if reference is not None:
                    with torch.no_grad():
                        loss_of(theirs, reference, layer, tokens, tokens // 2, "cuda")
                torch.autograd.backward(loss_of(theirs, policy, layer, tokens, tokens // 2, "cuda"))
                return
            values = logps(policy)
            if reference is not None:
                with torch.no_grad():
                    logps(reference)
            torch.autograd.backward(values.sum())

        with held_by(policy, optimizer) as peak:
            forward_and_backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return peak[0]


def one(arguments: argparse.Namespace) -> Held:
    """A cell of the table, in this process."""
    with tempfile.TemporaryDirectory() as where:
        base = Path(where)
        (base / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
        config = config_of(MODES[arguments.mode])
        if arguments.who == "ours":
            return simulate_step(config, base, arguments.tokens, arguments.tokens // 2, "cuda")
        return simulate_trl(
            config, base, arguments.tokens, live=arguments.who == "trl-live", lean=arguments.mode != "fp32"
        )


def validate(tokens: int, settings: dict[str, Any]) -> tuple[float, float, float, float]:
    """GiB of a step of the embedded model on this processor: measured and simulated over what the process held before; the whole
    process, and what `refscore plan` predicts of it.
    """
    import numpy as np

    from pipeline.config.experiment import PolicyConfig
    from pipeline.forward.trees import Tree
    from pipeline.hardware import return_freed_memory
    from pipeline.models.load import load_tokenizer
    from pipeline.models.locate import locate
    from pipeline.training.inputs.pairs import Pairs
    from pipeline.training.lean import StepInBackward
    from pipeline.training.optimizers import make_optimizer, update
    from pipeline.training.policies import load_policy
    from pipeline.training.step import accumulate

    base = locate(PolicyConfig())
    config = config_of({"train.tokens_per_batch": tokens, **settings})
    simulated = simulate_step(config, base, tokens, tokens // 2, "cpu").total
    tokenizer = load_tokenizer(base, config.policy)
    draw = np.random.default_rng(0)
    sizes = (tokens // 2, tokens // 4, tokens // 4)
    trees = [Tree(ids[0], (ids[1], ids[2])) for ids in ([draw.integers(5, 49000, size).tolist() for size in sizes],)]
    scores = [-np.ones(sizes[1], np.float32)]
    pairs = Pairs(["p"], trees, scores, scores)
    gc.collect()
    return_freed_memory()
    before = resident("VmRSS")
    policy = load_policy(base, config, tokenizer, pairs.ends)
    policy.model.train()
    optimizer = make_optimizer(policy.model, config.train)
    inside = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
    for step in range(3):
        if step == 1:
            gc.collect()
            return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
        means = accumulate(policy.forward, pairs, [0], config.train)
        if inside is None:
            update(policy.model, optimizer, 1e-6, config.train.max_grad_norm, means)
        else:
            inside.grad_norm()
    peak = resident("VmHWM")
    return peak - before, simulated / GIB, peak, of_process(simulated, "cpu")


def resident(field: str) -> float:
    """GiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


# glibc gives blocks of this size and more back to the system when they are freed; without it up to a GiB of holes stays resident
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
VALIDATED: dict[str, dict[str, Any]] = {
    "float32": {"train.precision": "float32"},
    "float32, gradient checkpointing": {"train.precision": "float32", "train.gradient_checkpointing": True},
    "bfloat16 autocast": {},
    "LoRA, float32": {"train.precision": "float32", "policy.lora": {"r": 16}},
    "lean": {name: value for name, value in LEAN.items() if name != "train.activation_offloading"},
}


def fresh(*arguments: str, **environment: str) -> str:
    """Output of this file in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory_train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--only", choices=("simulate", "validate"))
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, *rest = options.one
        if kind == "validate":
            print(json.dumps(validate(int(rest[1]), VALIDATED[rest[0]])))
        else:
            cell = argparse.Namespace(shape=rest[0], mode=rest[1], who=rest[2], tokens=int(rest[3]))
            print(json.dumps(one(cell).total / GIB))
        return
    if options.only != "simulate":
        print(
            "| SmolLM2-135M on this processor, 1,024 tokens | resident GiB | freed blocks returned at once | simulated "
            "| simulated / returned | whole process, returned | `refscore plan` | plan / process |\n"
            "|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        for name in VALIDATED:
            kept = json.loads(fresh("--one", "validate", name, "1024"))[0]
            measured, simulated, whole, planned = json.loads(fresh("--one", "validate", name, "1024", **RETURNING))
            print(
                f"| {name} | {kept:.2f} | {measured:.2f} | {simulated:.2f} | {simulated / measured:.2f} "
                f"| {whole:.2f} | {planned:.2f} | {planned / whole:.2f} |",
                flush=True,
            )
    if options.only != "validate":
        print("\n| simulated GiB | T | ours | TRL, precomputed | TRL, live | ours / live |\n|---|--:|--:|--:|--:|--:|")
        for shape in options.shapes:
            for mode in MODES:
                for tokens in options.tokens:
                    cells = [
                        float(fresh("--one", "cell", shape, mode, who, str(tokens)))
                        for who in ("ours", "trl", "trl-live")
                    ]
                    row = " | ".join(f"{cell:.1f}" for cell in cells)
                    print(f"| {shape}, {mode} | {tokens} | {row} | {cells[0] / cells[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
