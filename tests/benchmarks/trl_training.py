"""TRL's DPOTrainer on token ids, as the contestant of our trainer: one run in this process, its steps timed."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RATE, BETA = 1e-6, 0.1


@dataclass(frozen=True)
class TrlRun:
    """Seconds of each step, of what came before the first one, GiB at the allocator's peak (None without a GPU), and which of
    TRL's ways to save memory were in use.
    """

    steps: list[float]
    prepared: float
    peak_gib: float | None
    saves: str


def train_with_trl(
    model: str,
    rows: list[dict[str, Sequence[int]]],
    *,
    batch: int,
    steps: int,
    precomputed: bool,
    checkpointing: bool = False,
    lean: bool = False,
    lora: int | None = None,
) -> TrlRun:
    """`steps` steps of `batch` pairs on `rows` of prompt_ids, chosen_ids, rejected_ids.

    Weights are float32 under bfloat16 autocast; with `lean` they are bfloat16, with 8-bit AdamW, and Liger's fused loss if it is
    installed and the reference is live, else activations offloaded: TRL 1.13 can have one of the two. `precomputed`: the reference is
    scored first, else it is held beside the policy. `lora`: a rank. Raises RuntimeError if a loss is not finite.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class OfIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
            return dataset

    gpu = torch.cuda.is_available()
    narrow = lean or (lora is not None and gpu)  # a frozen base needs no float32

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if narrow else torch.float32)

    options: dict[str, Any] = {}
    if lean:
        # Liger's loss takes no precomputed scores, and calls torch.func inside, which refuses the hooks that offload activations
        liger = importlib.util.find_spec("liger_kernel") is not None and not precomputed
        options = {"optim": "adamw_bnb_8bit", "activation_offloading": gpu and not liger, "use_liger_kernel": liger}
    peft: dict[str, Any] = {}
    if lora is not None:
        from peft import LoraConfig

        peft = {
            "peft_config": LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type="CAUSAL_LM")
        }
    begun = time.monotonic()
    trainer = OfIds(
        model=load(),
        ref_model=None if precomputed or lora is not None else load(),
        args=DPOConfig(
            output_dir="trl", per_device_train_batch_size=batch, max_steps=steps,
            learning_rate=RATE, beta=BETA, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no",
            bf16=True, use_cpu=not gpu, report_to=[], gradient_checkpointing=checkpointing, max_length=None, disable_tqdm=True,
            precompute_ref_log_probs=precomputed, precompute_ref_batch_size=8, **options,
        ),
        # as often as one epoch needs, whose first step takes longer: the time to prepare counts every row
        train_dataset=Dataset.from_list(rows * math.ceil(batch * steps / len(rows))),
        processing_class=AutoTokenizer.from_pretrained(model),
        **peft,
    )  # fmt: skip
    prepared = time.monotonic() - begun
    begins: list[float] = []
    step = trainer.training_step

    def timed(*arguments: object, **named: object) -> torch.Tensor:
        begins.append(time.monotonic())
        return step(*arguments, **named)

    trainer.training_step = timed
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    begins.append(time.monotonic())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"TRL's losses are {losses}, not {steps} finite numbers")
    names = {"use_liger_kernel": "Liger's loss", "activation_offloading": "offloaded activations"}
    return TrlRun(
        [after - before for before, after in pairwise(begins)],
        prepared,
        torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        ", ".join(["checkpointing"] * checkpointing + [said for name, said in names.items() if options.get(name)]),
    )


def embedded() -> Path:
    """The directory of the embedded model."""
    from pipeline.config.training import PolicyConfig
    from pipeline.models.locate import locate

    return locate(PolicyConfig()).resolve()
