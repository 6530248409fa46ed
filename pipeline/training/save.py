"""The trained model as a Hugging Face directory: weights or an adapter, the base's tokenizer files, a filled model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, versions
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.errors import DataError
from pipeline.forward.trees import Tree
from pipeline.models.load import load_causal_lm
from pipeline.models.locate import copy_tokenizer, merge_adapter
from pipeline.training.policies import Policy, four_bits, precision_of, without_packing
from pipeline.training.reward_model import align_padding
from pipeline.training.save_check import CHECKED, must_agree, outputs_of
from pipeline.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_policy(
    policy: Policy, base: Path, config: Config, run: Run, card: str, tokenizer: Any, trees: Sequence[Tree]
) -> dict[str, float]:
    """Write what was trained: `run.adapter` in PEFT's layout where adapters were, and `run.model` in transformers' layout
    beside the tokenizer files of `base` (with adapters: merged in float32, if `policy.lora.merge`).

    Each is loaded again before it takes its place, and must give the trained model's outputs on `trees`; returns by how much
    they differ. Raises CheckError if one does not.
    """
    lora, rewards = config.policy.lora, config.train.objective == "reward"
    trees = trees[:CHECKED]
    trained = outputs_of(policy.model, trees, rewards=rewards)
    coarse = policy.model.dtype != torch.float32 or config.policy.load_in_4bit
    differences: dict[str, float] = {}

    def check(
        name: str, place: Path, load: Callable[[], PreTrainedModel], expected: np.ndarray, *, rough: bool
    ) -> None:
        difference = must_agree(load(), place, expected, trees, rewards=rewards, coarse=rough)
        differences[name] = difference

    if lora is None:
        _replace(
            run.model,
            lambda to: _save_whole(policy.model, base, to, card, tokenizer),
            lambda at: check("model", run.model, lambda: _load(at, config), trained, rough=coarse),
        )
        return differences
    _replace(
        run.adapter,
        lambda to: _save_adapter(policy.adapted, to, card),
        lambda at: check(
            "adapter",
            run.adapter,
            lambda: _with_adapter(policy.model, base, config, at).get_base_model(),
            trained,
            rough=coarse,
        ),
    )
    if not lora.merge:
        shutil.rmtree(run.model, ignore_errors=True)
        return differences
    full = config.model_copy(update={"policy": config.policy.model_copy(update={"load_in_4bit": False})})
    adapted = _with_adapter(policy.model, base, full, run.adapter)
    if config.policy.load_in_4bit:
        # trained on a base of four bits, merged into the base itself: what must agree is the adapter beside it
        trained = outputs_of(adapted.get_base_model(), trees, rewards=rewards)
    merged = adapted.merge_and_unload()
    _replace(
        run.model,
        lambda to: _save_whole(merged, base, to, card, tokenizer),
        lambda at: check(
            "model", run.model, lambda: _load(at, config), trained, rough=coarse and not config.policy.load_in_4bit
        ),
    )
    return differences


def trained_directory(run: Run, base: Path, config: Config) -> Path:
    """The trained policy as one model: `run.model`, or its adapter merged into `base` where only that was kept.

    Raises DataError where the run has neither.
    """
    if (run.model / "config.json").is_file():
        return run.model
    if (run.adapter / "adapter_config.json").is_file():
        return merge_adapter(base, config.policy, run.adapter)
    raise DataError(f"run {run.name!r} has no trained model: run 'refscore train' first")


def _save_whole(model: PreTrainedModel, base: Path, directory: Path, card: str, tokenizer: Any) -> None:
    model.save_pretrained(directory)
    copy_tokenizer(base, directory)
    if getattr(model.config, "num_labels", None) == 1:
        align_padding(directory, tokenizer, model.config.pad_token_id)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _save_adapter(adapted: Any, directory: Path, card: str) -> None:
    adapted.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _with_adapter(model: PreTrainedModel, base: Path, config: Config, adapter: Path) -> Any:
    """PEFT's view of the adapter on a fresh base: in float32, as one of fewer bits would round it away, or in the four bits that
    it was trained on.
    """
    from peft import PeftModel

    options: dict[str, Any] = {"quantization_config": four_bits(torch.float32)} if config.policy.load_in_4bit else {}
    if config.train.objective == "reward":
        fresh = type(model).from_pretrained(
            base,
            num_labels=1,
            pad_token_id=model.config.pad_token_id,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=config.policy.trust_remote_code,
            **options,
        )
    else:
        fresh = load_causal_lm(base, config.policy, torch.float32, **options)
    if options:
        without_packing(fresh)
    return PeftModel.from_pretrained(fresh, adapter)


def _load(directory: Path, config: Config) -> PreTrainedModel:
    if config.train.objective != "reward":
        return load_causal_lm(directory, config.policy, torch.float32)
    from transformers import AutoModelForSequenceClassification

    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        directory,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return model


def _replace(directory: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Make `directory` anew with `write`, if what was written passes `check`; the old one goes in one step."""
    temporary, old = durable.temporary_beside(directory), durable.temporary_beside(directory)
    try:
        with durable.explaining_disk(directory):
            write(temporary)
            check(temporary)
            for file in temporary.iterdir():
                durable.flush(file)
            if directory.exists():
                directory.rename(old)
            temporary.rename(directory)
            durable.flush(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def model_card(config: Config, run: str, reference_id: str, pairs: int, results: dict[str, float | None]) -> str:
    """The model card: base, data, settings and results of this run."""
    train = config.train
    base = config.policy.model
    reward = train.objective == "reward"
    task = "text-classification" if reward else "text-generation"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [dpo, refscore]"]
    if "/" in base and not Path(base).exists():
        front.append(f"base_model: {base}")
    names = ["Bradley-Terry"] if reward else train.loss_type
    weights = train.loss_weights or [1.0] * len(names)
    lora = config.policy.lora
    settings = {
        "loss": " + ".join(
            name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
        ),
        **({} if reward else {"beta": train.beta, "label smoothing": train.label_smoothing}),
        "weights trained": "all"
        if lora is None
        else f"LoRA, rank {lora.r}, alpha {lora.alpha:g}, {lora.target_modules}",
        "optimizer": train.optimizer,
        "learning rate": train.learning_rate,
        "schedule": f"{train.lr_scheduler_type}, warm-up {train.warmup_ratio:g} of the steps",
        "pairs a step": train.per_device_train_batch_size * train.gradient_accumulation_steps,
        "epochs": train.num_train_epochs if train.max_steps <= 0 else f"{train.max_steps} steps",
        "gradient norm clipped at": train.max_grad_norm,
        "precision": str(precision_of(train)).removeprefix("torch."),
        "seed": train.seed,
    }
    against = (
        f"against stored log-probabilities of the reference `{config.reference.model}` (reference_id `{reference_id[:16]}`)"
        if not reference_free(train)
        else "without a reference"
    )
    shown = {name: f"{value:.4f}" for name, value in results.items() if value is not None}
    return "\n".join(
        [
            *front,
            "---",
            f"# {run}",
            "",
            (
                f"`{base}` trained {'as a reward model' if reward else 'with preference optimization'} on {pairs} pairs from "
                f"{', '.join(f'`{path}`' for path in config.data.path)}, {against}, with refscore {__version__}."
            ),
            "",
            "## Settings",
            "",
            *_markdown_table("setting", {name: str(value) for name, value in settings.items()}),
            "",
            "## Held-out pairs",
            "",
            *(_markdown_table("figure", shown) if shown else ["None were held out."]),
            "",
            "## Versions",
            "",
            *_markdown_table("package", versions()),
            "",
        ]
    )


def _markdown_table(head: str, values: dict[str, str]) -> list[str]:
    return [f"| {head} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())]
