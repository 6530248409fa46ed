"""`make bench-memory-devices`: what each of several devices holds at the peak of a training step, ours and TRL's, simulated.

Simulated: as `refscore plan --devices` does it, on tensors without numbers with processes that are not there, so without the
fragmentation of an allocator, CUDA's context and NCCL's buffers; and that simulation against two real processes of this machine.
A forward pass of ours reads `T` tokens of pairs whose prompt is half of them and whose responses are a quarter each. TRL reads the
same pairs as two sequences, each with its prompt: one and a half times as many tokens. "plain" are float32 weights that are read in
bfloat16, with AdamW; "lean" are bfloat16 weights, 8-bit AdamW and a loss that makes no whole logits. Both compute activations again.

TRL's step is written here after TRL 1.13 (`DPOTrainer._compute_loss`, `_compute_loss_liger`, `prepare_fsdp`) and accelerate 1.15
(`fsdp2_prepare_model`): a group for each layer, one for the embeddings, one for norm and head; a reference is one single group, so
that all of it is gathered to be read. It is given what the two cannot do together: a loss without whole logits beside precomputed
scores, and 8-bit AdamW of weights in parts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config.experiment import Config
from pipeline.planning.numberless import model_of, optimizer_of
from pipeline.planning.outlook import of_process
from pipeline.planning.training import Held, held_by, seeming, simulate_step, with_states
from tests.benchmarks.memory_train import GIB, RETURNING, config_of, resident
from tests.benchmarks.shapes import LLAMA_8B, LLAMA_70B

SHAPES = {"Llama-3.1-8B": (LLAMA_8B, (2, 8)), "Llama-3.1-70B": (LLAMA_70B, (8, 16))}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lean": {"policy.dtype": "bfloat16", "train.optimizer": "adamw_8bit"},
}
WHO = ("ours", "ours-several", "trl", "trl-live")
VALIDATED: dict[str, dict[str, Any]] = {
    "float32": {"train.precision": "float32"},
    "float32, gradient checkpointing": {"train.precision": "float32", "train.gradient_checkpointing": True},
    "bfloat16": {},
    "lean": MODES["lean"],
}


def simulate_trl(config: Config, base: Path, tokens: int, devices: int, *, live: bool, lean: bool) -> Held:
    """TRL's step for pairs that are `tokens` tokens of ours."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from trl.trainer.utils import selective_log_softmax

    length = tokens * 3 // 4
    narrow: dict[str, Any] = (
        {} if lean else dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.bfloat16)
    )
    with seeming(devices) as mesh, torch._subclasses.FakeTensorMode():
        how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**narrow)}
        policy, layer = model_of(config, base, "cuda")
        for part in policy.model.layers:
            fully_shard(part, **how)
        fully_shard(policy.get_input_embeddings(), **how)
        fully_shard([policy.model.norm, policy.get_output_embeddings()], reshard_after_forward=False, **how)
        fully_shard(policy, **how)
        reference = model_of(config, base, "cuda")[0].eval().requires_grad_(False) if live else None
        if reference is not None:
            fully_shard(reference, reshard_after_forward=True, **how)
        whole = list(policy.parameters())
        parts = torch.nn.ParameterList(torch.nn.Parameter(weight.to_local().detach()) for weight in whole)
        optimizer = with_states(optimizer_of(parts, config), parts)

        given: dict[str, Any] = {
            "input_ids": torch.zeros(2, length, dtype=torch.int64),
            "position_ids": torch.zeros(2, length, dtype=torch.int64),
            "attention_mask": torch.zeros(2, 1, 1, 1),
            "use_cache": False,
        }

        def logps(model: Any) -> torch.Tensor:
            logits = model(**given).logits
            return selective_log_softmax(logits[:, :-1], given["input_ids"][:, 1:]).sum()

        def without_logits(model: Any) -> torch.Tensor:
            head = model.get_output_embeddings()

            def loss(hidden: torch.Tensor) -> torch.Tensor:
                hidden_NH, targets = hidden.flatten(0, 1)[: tokens // 2], torch.zeros(tokens // 2, dtype=torch.int64)
                # gathered now
                return replace(layer, weight_VH=head.weight).logps(hidden_NH, targets, torch.bfloat16)[0].sum()

            # so that the hooks of the head's group and of the outermost stand around what is theirs
            head.forward = loss
            model.forward = lambda: head(model.model(**given).last_hidden_state)
            found: torch.Tensor = model()
            return found

        read = without_logits if lean else logps
        with held_by(policy, optimizer) as peak:
            loss = read(policy)
            if reference is not None:
                with torch.no_grad():
                    read(reference)
            torch.autograd.backward(loss)
            for weight, part in zip(whole, parts, strict=True):
                part.grad, weight.grad = weight.grad.to_local(), None
            optimizer.step()
            optimizer.zero_grad()
    if reference is None:
        return peak[0]
    # the tracker knows one model; what the other one keeps all the time is its part of the weights
    kept = sum(weight.to_local().numel() * weight.element_size() for weight in reference.parameters())
    return replace(peak[0], weights=peak[0].weights + kept)


def one(shape: str, mode: str, who: str, devices: int, tokens: int) -> Held:
    """What a device holds by one of `WHO`, in this process; "ours-several": in a step of several passes, at a later one."""
    with tempfile.TemporaryDirectory() as where:
        base = Path(where)
        (base / "config.json").write_text(json.dumps(SHAPES[shape][0]))
        config = config_of(MODES[mode])
        if who.startswith("ours"):
            several = who == "ours-several"
            return simulate_step(config, base, tokens, tokens // 2, "cuda", devices, accumulated=several)
        return simulate_trl(config, base, tokens, devices, live=who == "trl-live", lean=mode == "lean")


def validate(tokens: int, settings: dict[str, Any]) -> None:
    """In one of several processes: GiB of a step of the embedded model on this processor, of which each reads a pair. The first
    prints what it measured and what is simulated, over what it held before, then its whole process, and what is predicted of it.
    """
    import numpy as np

    from pipeline.forward.trees import Tree
    from pipeline.hardware import return_freed_memory
    from pipeline.models.load import load_tokenizer
    from pipeline.models.locate import locate
    from pipeline.training.inputs.pairs import Pairs
    from pipeline.training.optimizers import make_optimizer, update
    from pipeline.training.parallel.sharded import Shards, mesh_of
    from pipeline.training.parallel.world import world
    from pipeline.training.policies import load_policy, precision_of
    from pipeline.training.step import accumulate

    config = config_of({"train.tokens_per_batch": tokens, **settings})
    base = locate(config.policy)
    draw = np.random.default_rng(0)
    sizes = (tokens // 2, tokens // 4, tokens // 4)
    with world() as here:
        simulated_gib = float(os.environ["SIMULATED"])
        tokenizer = load_tokenizer(base, config.policy)
        ids = [[draw.integers(5, 49000, size).tolist() for size in sizes] for _ in range(here.size)]
        trees = [Tree(trunk, (chosen, rejected)) for trunk, chosen, rejected in ids]
        scores = [-np.ones(sizes[1], np.float32)] * here.size
        pairs = Pairs([f"p{number}" for number in range(here.size)], trees, scores, scores)
        gc.collect()
        return_freed_memory()
        before = resident("VmRSS")
        policy = load_policy(base, config, tokenizer, pairs.ends)
        policy.model.train()
        shards = Shards(policy.model, policy.forward, here, mesh_of(here), precision_of(config))
        optimizer = make_optimizer(shards.module(), config.train)
        for step in range(3):
            if step == 1:
                gc.collect()
                return_freed_memory()
                Path("/proc/self/clear_refs").write_text("5")
            means = accumulate(shards.forward, pairs, range(here.size), config.train, world=here)
            update(shards.module(), optimizer, 1e-6, config.train.max_grad_norm, means, shards.clip)
        peak = resident("VmHWM")
        if here.first:
            print(json.dumps([peak - before, simulated_gib, peak, of_process(int(simulated_gib * GIB), "cpu")]))


def simulated(tokens: int, settings: dict[str, Any], devices: int) -> float:
    """GiB that `validate` should measure."""
    from pipeline.models.locate import locate

    config = config_of({"train.tokens_per_batch": tokens, **settings})
    held = simulate_step(config, locate(config.policy), tokens, tokens // 2, "cpu", devices)
    return held.total / GIB


def fresh(*arguments: str, devices: int = 1, **environment: str) -> str:
    """Output of this file in fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    command = [sys.executable, *(launcher if devices > 1 else []), "-m", "tests.benchmarks.memory_devices", *arguments]
    there = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=there)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--only", choices=("simulate", "validate"))
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, *rest = options.one
        if kind == "validate":
            validate(int(rest[1]), VALIDATED[rest[0]])
        elif kind == "simulated":
            print(simulated(int(rest[1]), VALIDATED[rest[0]], int(rest[2])))
        else:
            print(json.dumps(vars(one(rest[0], rest[1], rest[2], int(rest[3]), int(rest[4])))))
        return
    if options.only != "simulate":
        print(
            "| SmolLM2-135M in two processes, 1,024 tokens each | resident GiB of the first | simulated "
            "| simulated / resident | whole process | `refscore plan` | plan / process |\n|---|--:|--:|--:|--:|--:|--:|"
        )
        for name in VALIDATED:
            expected = fresh("--one", "simulated", name, "1024", "2")
            line = fresh("--one", "validate", name, "1024", devices=2, SIMULATED=expected, **RETURNING)
            measured, held, whole, planned = json.loads(line)
            print(
                f"| {name} | {measured:.2f} | {held:.2f} | {held / measured:.2f} | {whole:.2f} | {planned:.2f} "
                f"| {planned / whole:.2f} |",
                flush=True,
            )
    if options.only != "validate":
        kinds = list(Held.__dataclass_fields__)
        columns = [*kinds, "ours", "ours, several passes", "TRL, precomputed", "TRL, live"]
        print(f"\n| simulated GiB on each device | devices | {' | '.join(columns)} |")
        print("|---|" + "--:|" * (len(columns) + 1))
        for shape in options.shapes:
            for devices in SHAPES[shape][1]:
                for mode in MODES:
                    held = [
                        json.loads(fresh("--one", "cell", shape, mode, who, str(devices), str(options.tokens)))
                        for who in WHO
                    ]
                    sizes = [*(held[0][kind] for kind in kinds), *(sum(each.values()) for each in held)]
                    cells = " | ".join(f"{size / GIB:.1f}" for size in sizes)
                    print(f"| {shape}, {mode} | {devices} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
