"""Time and memory of training steps, ours and TRL's; tokens per second of scoring and of sampling."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config.experiment import GenerateConfig, ReferenceConfig
from pipeline.engines.protocol import Request, numerics_of
from pipeline.engines.start import start_scorer
from pipeline.engines.vllm.generator import generator
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind, peak_memory_gib
from pipeline.models.load import load_tokenizer
from pipeline.training.lean import StepInBackward, offloaded_activations
from pipeline.training.optimizers import make_optimizer, numbers, update
from pipeline.training.policies import load_policy, on_a_gpu
from pipeline.training.step import accumulate, must_be_finite
from tests.benchmarks.memory_train import LEAN
from tests.benchmarks.trl_training import train_with_trl
from tests.gpu_check.cell import config_of, directory_of, flop_of, random_pairs, random_trees, sizes


def training_step(model: str, who: str, mode: str, where: Path) -> dict[str, Any]:
    """Median seconds of the steps after the first, tokens per second, peak memory of all steps, and what was done to save it.

    `who`: refscore, trl-live, trl-precomputed. `mode`: full (float32 weights under bfloat16 autocast), lean, LoRA, whose activations
    are not offloaded. Tokens count every prompt once, whoever reads it twice. Without a GPU the memory is the whole process's.
    Raises NotFinite or RuntimeError if a loss is not finite.
    """
    size = sizes()
    directory = directory_of(model, where)
    trees = random_trees(size.pairs_per_step, size.prompt, size.response)
    if who == "refscore":
        seconds, saves = _ours(directory, trees, mode)
    else:
        rows = [
            {"prompt_ids": tree.trunk, "chosen_ids": tree.branches[0], "rejected_ids": tree.branches[1]}
            for tree in trees
        ]
        os.chdir(where)
        run = train_with_trl(
            str(directory), rows, batch=size.pairs_per_step, steps=size.steps, precomputed=who == "trl-precomputed",
            checkpointing=True, lean=mode == "lean", lora=16 if mode == "LoRA" else None,
        )  # fmt: skip
        seconds, saves = run.steps, run.saves
    tokens = sum(len(tree.trunk) + sum(map(len, tree.branches)) for tree in trees)
    usual = median(seconds[1:])
    return {
        "seconds per step": f"{usual:.3f}",
        "tokens/s": f"{tokens / usual:.0f}",
        "peak GiB": f"{peak_memory_gib():.1f}",
        "saving memory by": saves,
    }


def _ours(directory: Path, trees: list[Tree], mode: str) -> tuple[list[float], str]:
    settings = {"full": {}, "lean": LEAN, "LoRA": {"policy.lora": {"r": 16}}}[mode]
    config = config_of(directory, {"train.precision": "bfloat16", **settings})
    pairs = random_pairs(trees)
    policy = load_policy(directory, config, load_tokenizer(directory, config.policy), pairs.ends)
    policy.model.train()
    optimizer = make_optimizer(policy.model, config.train)
    inside = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
    if device_kind() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    for _ in range(sizes().steps):
        begun = time.monotonic()
        with offloaded_activations(policy.model) if config.train.activation_offloading else nullcontext():
            means = accumulate(policy.forward, pairs, range(len(pairs)), config.train)
        if inside is None:
            values = update(policy.model, optimizer, 1e-6, config.train.max_grad_norm, means)
        else:
            values = numbers({**means, "grad_norm": inside.grad_norm()})
        must_be_finite(values, pairs, range(len(pairs)), config.train)
        seconds.append(time.monotonic() - begun)
    used = {
        "checkpointing": on_a_gpu(config.train.gradient_checkpointing),
        "offloaded activations": config.train.activation_offloading,
        "the step inside backward": config.train.optimizer_in_backward,
    }
    return seconds, ", ".join(name for name, is_used in used.items() if is_used)


def scoring(model: str, engine: str, where: Path) -> dict[str, Any]:
    """Tokens per second of scoring in bfloat16, prompts read once, and its arithmetic as a share of a large product's."""
    size, directory = sizes(), directory_of(model, where)
    trees = random_trees(2 * size.scored_pairs, size.prompt, size.response)
    requests = [Request(tree.trunk, branch) for tree in trees for branch in tree.branches]
    reference = ReferenceConfig.model_validate({"model": str(directory), "engine": engine, "dtype": "bfloat16"})
    with start_scorer(reference, directory, numerics_of(reference), max(map(len, requests))) as scorer:
        # other sequences than are measured, so that kernels are compiled and no prompt is in the cache
        scorer.score(requests[2 * size.scored_pairs :])
        begun = time.monotonic()
        scorer.score(requests[: 2 * size.scored_pairs])
        seconds = time.monotonic() - begun
    measured = trees[: size.scored_pairs]
    scored = sum(len(branch) for tree in measured for branch in tree.branches)
    read = scored + sum(len(tree.trunk) for tree in measured)
    return {
        "tokens/s": f"{read / seconds:.0f}",
        "share of the matmul peak": f"{flop_of(directory, read, scored) / seconds / matmul_peak():.2f}",
    }


def sampling(model: str, where: Path) -> dict[str, Any]:
    """Sampled tokens per second in bfloat16."""
    size, directory = sizes(), directory_of(model, where)
    settings = GenerateConfig.model_validate(
        {"dtype": "bfloat16", "max_tokens": size.sampled_tokens, "temperature": 1.0, "samples": 1}
    )
    prompts = [tree.trunk for tree in random_trees(2 * size.sampled_prompts, size.prompt, 1)]
    spec = ReferenceConfig(model=str(directory))
    with generator(directory, spec, size.prompt, settings) as generate:
        generate(prompts[size.sampled_prompts :], settings, lambda *_: None)
        begun = time.monotonic()
        samples = generate(prompts[: size.sampled_prompts], settings, lambda *_: None)
        seconds = time.monotonic() - begun
    return {"tokens/s": f"{sum(len(sample.ids) for one in samples for sample in one) / seconds:.0f}"}


def matmul_peak() -> float:
    """Operations per second of a large product in bfloat16, the best of ten after one to warm up."""
    size = 8192 if device_kind() == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device_kind()) for _ in range(2))
    seconds = []
    for _ in range(11):
        begun = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return 2.0 * size**3 / min(seconds[1:])
