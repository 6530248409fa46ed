"""What an experiment takes beside memory: disk by what is kept there, and time by how fast this machine multiplies."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from pipeline.artifacts.runs import RUNS
from pipeline.config.experiment import Config
from pipeline.engines.vllm.engine import concurrent
from pipeline.hardware import device_kind, memory_gib
from pipeline.models.configuration import read_config
from pipeline.models.locate import locate
from pipeline.models.weights import loaded_files
from pipeline.planning.outlook import Outlook, again, of_process
from pipeline.planning.sampled import Sampled
from pipeline.precompute.plan import Plan
from pipeline.training.inputs.batches import tokens_in_a_pass
from pipeline.training.policies import precision_of

# of what a plain product of matrices reaches, in whole stages; measured on a CPU with a model of 135 million parameters
_OF_PRODUCTS = {"scoring": 0.5, "training": 0.5}
_PRODUCT_SECONDS = 0.3
# a score's key, lengths and sum beside its log-probabilities
_BESIDE_A_SCORE = 80
# two sums and a step, of a training pair at its last visit and of a held-out one before training and after
_OF_A_PAIR = {"train": 20, "eval": 40}


@dataclass(frozen=True)
class Disk:
    """Bytes that an experiment writes, by what they are, and what is free there."""

    checkpoints: int
    model: int
    pairs: int
    store: int
    free: int
    samples: int = 0

    @property
    def total(self) -> int:
        """All that is written."""
        return self.checkpoints + self.model + self.pairs + self.store + self.samples


@dataclass(frozen=True)
class Speeds:
    """Tokens per second on one device of this machine, and the products of matrices per second that they rest on (FLOP/s).

    A token that is sampled waits for all weights to be read, beside as many others as are sampled at once.
    """

    scoring: float
    training: float
    sampling: float
    products: float


def parameters_in(directory: Path) -> int:
    """Numbers in a model's weights, by the headers of its files alone."""
    count = 0
    for file in loaded_files(directory):
        with safe_open(file, framework="np") as tensors:
            count += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return count


def disk(config: Config, plan: Plan, seen: Outlook, sampled: Sampled | None = None) -> Disk:
    """What the stages write for `config`, without stage three's samples and reports, which are small beside it.

    `sampled`: what a training on samples has of them, as long as they can be.
    """
    parameters = parameters_in(locate(config.policy))
    state = seen.devices * seen.training.optimizer if seen.training else 8 * parameters
    # an adapter's weights are half of what AdamW keeps of them
    learning = state // 2 if config.policy.lora else parameters * (4 if config.policy.dtype == "float32" else 2)
    # the new one is whole before an old one is removed
    logps = 0 if sampled else sum(count * _OF_A_PAIR[split] for split, count in plan.pairs.splits.items())
    checkpoints = (config.train.save_total_limit + 1) * (learning + state + logps)
    merged = config.policy.lora is None or config.policy.lora.merge
    responses = plan.pairs.response_tokens
    per_token = 2 if config.reference.logps == "fixed_point" else 4
    missing = len(plan.absent) * _BESIDE_A_SCORE + per_token * int(responses[plan.absent].sum(dtype=np.int64))
    if sampled:
        missing = sampled.to_score * _BESIDE_A_SCORE + per_token * sampled.responses_to_score
    place = next(path for path in (RUNS, *RUNS.parents) if path.exists())
    return Disk(
        checkpoints=checkpoints,
        model=parameters * _saved_width(config, seen.kind) * int(merged),
        pairs=plan.pairs.bytes + (0 if sampled else 4 * int(responses.sum(dtype=np.int64))),
        store=missing,
        free=shutil.disk_usage(place).free,
        samples=_of_samples(sampled) if sampled else 0,
    )


def _of_samples(sampled: Sampled) -> int:
    """Ids in a shard and in rollouts.parquet, beside each of which two log-probabilities stand, and a prompt's ids."""
    responses = sampled.samples * sampled.max_tokens
    return 4 * (4 * responses + sampled.each * int(sampled.prompts.sum()))


def speeds(config: Config, plan: Plan) -> Speeds:
    """How fast the stages would be here, from a product of matrices that is timed now; half or twice as fast is as likely."""
    scored_in = torch.float32 if plan.identity.numerics.dtype == "float32" else torch.bfloat16
    trained_in = precision_of(config)
    products = {dtype: _products_per_second(dtype) for dtype in {scored_in, trained_in}}
    scored, trained = parameters_in(plan.reference.paths.merged), parameters_in(locate(config.policy))
    checkpointing = config.train.gradient_checkpointing
    again = checkpointing is True or (checkpointing == "auto" and device_kind() == "cuda")
    return Speeds(
        # a forward pass is two operations per parameter and token, a backward pass four
        scoring=_OF_PRODUCTS["scoring"] * products[scored_in] / (2 * scored),
        training=_OF_PRODUCTS["training"] * products[trained_in] / ((8 if again else 6) * trained),
        sampling=min(
            _OF_PRODUCTS["scoring"] * products[scored_in] / (2 * scored), concurrent() * _reads(scored, scored_in)
        ),
        products=products[trained_in],
    )


def memory_here() -> float:
    """GiB of the device that this machine trains on."""
    if device_kind() == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return memory_gib()


def length_that_fits(config: Config, plan: Plan, seen: Outlook, gib: float) -> int | None:
    """The largest `data.max_length` whose pairs train within `gib`; None if something else than a long pair takes the memory."""
    if seen.training is None or seen.longest <= tokens_in_a_pass(config.train, seen.kind):
        return None
    # memory grows evenly with the tokens of a pass: two passes tell how
    half = seen.tokens_per_pass // 2
    low = of_process(again(config, seen, half).total, seen.kind)
    per_token = (seen.training_gib - low) / (seen.tokens_per_pass - half)
    tokens = half + int((gib - low) / per_token)
    longest = plan.pairs.sequences_longest[plan.pairs.tree_tokens > tokens]
    length = int(longest.min()) - 1 if len(longest) else None
    return length if length and tokens > 0 else None


def _saved_width(config: Config, kind: str) -> int:
    policy = config.policy
    if policy.save_dtype == "float32" or (policy.save_dtype == "auto" and kind == "cpu"):
        return 2 if policy.save_dtype == "auto" and policy.dtype == "bfloat16" else 4
    base = read_config(locate(policy))
    return 4 if "float32" in str(base.get("dtype") or base.get("torch_dtype") or "float32") else 2


def _reads(parameters: int, dtype: torch.dtype) -> float:
    """How often per second as many numbers are read from this machine's memory."""
    numbers = torch.ones(2**26, dtype=dtype, device=device_kind())
    fastest = min(_seconds(numbers) for _ in range(3))
    return len(numbers) / parameters / fastest


def _seconds(numbers: torch.Tensor) -> float:
    started = time.perf_counter()
    numbers.max().item()
    return time.perf_counter() - started


def _products_per_second(dtype: torch.dtype) -> float:
    kind = device_kind()
    left, right = (torch.ones(1024, 1024, dtype=dtype, device=kind) for _ in range(2))
    left @ right  # the first one starts threads or kernels
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _PRODUCT_SECONDS:
        left @ right
        if kind == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * 1024**3 / passed
