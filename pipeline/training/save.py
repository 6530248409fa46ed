"""The trained model as a Hugging Face directory: weights or an adapter, the base's tokenizer files, a filled model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.artifacts import durable
from pipeline.artifacts.markdown import markdown_table, name_for_others
from pipeline.artifacts.runs import Run, versions
from pipeline.config.experiment import Config
from pipeline.config.losses import data_of, reference_free
from pipeline.config.sections import changed
from pipeline.config.training import TrainConfig
from pipeline.forward.trees import Tree
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.models.configuration import read_config
from pipeline.models.locate import copy_tokenizer
from pipeline.training.checks.export import CHECKED, must_agree, outputs_of
from pipeline.training.objectives.objective import objective_of
from pipeline.training.objectives.reward_model import align_padding
from pipeline.training.policies import Policy, four_bits, precision_of, without_packing
from pipeline.training.schedule import pairs_per_step
from pipeline.training.weights_files import are_converted, weights_of, write_configuration, write_weights
from pipeline.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# by which the Hub's search finds it
_TAGS = {
    "preference": "dpo",
    "reward": "reward-model",
    "policy_gradient": "policy-gradient",
    "value": "value-model",
}
# dtypes that a base may have been saved in; of any other (8 bits) model/ is float32
_SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_policy(
    policy: Policy, base: Path, config: Config, run: Run, card: str, tokenizer: Any, trees: Sequence[Tree]
) -> dict[str, float]:
    """Write what was trained: `run.adapter` in PEFT's layout if adapters were, and `run.model` in transformers' layout
    beside the tokenizer files of `base` (with adapters: merged in float32, if `policy.lora.merge`).

    Each is loaded again before it takes its place, and must give the trained model's outputs on `trees`; returns by how much
    they differ. Raises CheckError if one does not.
    """
    lora, objective = config.policy.lora, objective_of(config.train)
    trees = trees[:CHECKED]
    trained = outputs_of(policy.model, trees, objective)
    kept_in = saved_dtype(config, base)
    coarse = {policy.model.dtype, kept_in} != {torch.float32} or config.policy.load_in_4bit
    differences: dict[str, float] = {}

    def check(
        name: str, place: Path, load: Callable[[], PreTrainedModel], expected: np.ndarray, *, rough: bool
    ) -> None:
        again = outputs_of(load().to(policy.model.device), trees, objective)
        return_freed_memory()
        differences[name] = must_agree(again, place, expected, len(trees), coarse=rough)

    if lora is None:
        _replace(
            run.model,
            lambda to: _save_whole(policy.model, base, to, card, tokenizer, config, kept_in),
            lambda directory: check(
                "model", run.model, lambda: objective.load_again(directory, config, policy.model), trained, rough=coarse
            ),
        )
        return differences
    _replace(
        run.adapter,
        lambda to: write_adapter(policy.adapted, to, card),
        lambda directory: check(
            "adapter",
            run.adapter,
            lambda: _with_adapter(policy.model, base, config, directory).get_base_model(),
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
        trained = outputs_of(adapted.get_base_model(), trees, objective)
    merged = adapted.merge_and_unload()
    _replace(
        run.model,
        lambda to: _save_whole(merged, base, to, card, tokenizer, config, kept_in),
        lambda directory: check(
            "model",
            run.model,
            lambda: objective.load_again(directory, config, policy.model),
            trained,
            rough=coarse and not config.policy.load_in_4bit,
        ),
    )
    return differences


def saved_dtype(config: Config, base: Path) -> torch.dtype:
    """What `policy.save_dtype` means on this machine."""
    setting, saved = config.policy.save_dtype, read_config(base)
    name = "float32"
    if setting == "auto" and device_kind() == "cpu":
        name = config.policy.dtype
    elif setting != "float32":
        name = str(saved.get("dtype") or saved.get("torch_dtype") or name).removeprefix("torch.")
    return _SAVED.get(name, torch.float32)


def _save_whole(
    model: PreTrainedModel, base: Path, directory: Path, card: str, tokenizer: Any, config: Config, dtype: torch.dtype
) -> None:
    if are_converted(model):
        rounded = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in model.state_dict().items()
        }
        model.save_pretrained(directory, state_dict=rounded, max_shard_size=config.policy.max_shard_size)
    weights = weights_of(model)
    write_configuration(model, directory, dtype)
    if not are_converted(model):
        write_weights(directory, weights, weights.items(), dtype, config.policy.max_shard_size)
    write_beside(model, base, directory, card, tokenizer)


def write_beside(model: PreTrainedModel, base: Path, directory: Path, card: str, tokenizer: Any) -> None:
    """Write the base's tokenizer files and the model card."""
    copy_tokenizer(base, directory)
    if getattr(model.config, "num_labels", None) == 1:
        align_padding(directory, tokenizer, model.config.pad_token_id)
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_adapter(adapted: Any, directory: Path, card: str, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write adapters in PEFT's layout; `state`: their weights, if `adapted` has not all of them."""
    adapted.save_pretrained(directory, state_dict=state)
    path = directory / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes a set, each time in another order
    if isinstance(content.get("target_modules"), list):
        content["target_modules"].sort()
        path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")


def _with_adapter(model: PreTrainedModel, base: Path, config: Config, adapter: Path) -> Any:
    """PEFT's view of the adapter on a fresh base: in float32, as one of fewer bits would round it away, or in the four bits that
    it was trained on.
    """
    from peft import PeftModel

    options: dict[str, Any] = {"quantization_config": four_bits(torch.float32)} if config.policy.load_in_4bit else {}
    fresh = objective_of(config.train).load_again(base, config, model, **options)
    if options:
        without_packing(fresh)
    return PeftModel.from_pretrained(fresh, adapter)


def _replace(directory: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> None:
    """Make `directory` anew with `write`, if what was written passes `check`; the old one goes in one step."""
    temporary = durable.temporary_beside(directory)
    try:
        with durable.explaining_disk(directory):
            write(temporary)
            check(temporary)
            put_in_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, directory: Path) -> None:
    """Give what is whole its place, durably; the old one goes in one step."""
    old = durable.temporary_beside(directory)
    try:
        for file in temporary.iterdir():
            durable.flush(file)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
        durable.flush(directory.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _tag(train: TrainConfig) -> str:
    """What the Hub's search finds the model by: its objective, or the loss of responses and lists."""
    named_by_loss = train.objective == "preference" and data_of(train) != "pairs"
    return train.loss_type[0].replace("_", "-") if named_by_loss else _TAGS[train.objective]


def model_card(config: Config, run: str, reference_id: str, pairs: int, results: dict[str, float | None]) -> str:
    """The model card: base, data, settings and results of this run; it may be published, so no path of this machine is in it."""
    from huggingface_hub import ModelCardData

    train, base, objective = config.train, name_for_others(config.policy.model), objective_of(config.train)
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag=objective.pipeline_tag,
        tags=[
            "refscore",
            _tag(train),
        ],
        base_model=base if "/" in base and not base.startswith("embedded:") else None,
    )
    against = "without a reference"
    settings = train.policy_gradient
    of_samples = {"policy_gradient": settings.reads_reference, "value": settings.kl_in_reward > 0}
    if of_samples.get(train.objective, not reference_free(train)):
        named = f"`{name_for_others(config.reference.model)}` (reference_id `{reference_id[:16]}`)"
        by = config.reference.imported_by
        whose = f"log-probabilities that {by} computed (imported, unverified)" if by else "stored log-probabilities"
        against = f"against {whose} of the reference {named}"
    data = ", ".join(f"`{name_for_others(path)}`" for path in config.data.path)
    figures = [[name, f"{value:.4f}"] for name, value in results.items() if value is not None]
    parts = [
        f"---\n{front.to_yaml()}\n---\n# {run}",
        (
            f"`{base}` trained {objective.in_words} on {pairs} {objective.unit}s from {data}, {against}, "
            f"with refscore {__version__}."
        ),
        "## Settings",
        markdown_table(["setting", "value"], list(_settings(config).items())),
        f"## Held-out {objective.unit}s",
        markdown_table(["figure", "value"], figures) or "None were held out.",
        "## Versions",
        markdown_table(["package", "version"], list(versions().items())),
    ]
    return "\n\n".join(parts) + "\n"


def _of_samples(config: Config) -> dict[str, object]:
    """What a policy gradient was made with: settings that differ from their defaults, and how many samples of each prompt."""
    settings = config.train.policy_gradient
    return {"variant": settings.variant, "samples per prompt": config.rollout.samples} | {
        name: getattr(settings, name) for name in sorted(changed(settings) - {"variant"})
    }


def _settings(config: Config) -> dict[str, object]:
    train, lora = config.train, config.policy.lora
    names, weights = train.loss_type, train.loss_weights or [1.0] * len(train.loss_type)
    losses = [name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)]
    preference = {"loss": " + ".join(losses), "beta": train.beta, "label smoothing": train.label_smoothing}
    of_objective: dict[str, dict[str, object]] = {
        "preference": preference,
        "reward": {"loss": "Bradley-Terry"},
        "policy_gradient": {f"policy gradient: {name}": value for name, value in _of_samples(config).items()},
        "value": {
            "loss": "squared error of returns",
            "samples per prompt": config.rollout.samples,
            "discount": train.policy_gradient.gae_gamma,
            "KL to the reference in the reward": train.policy_gradient.kl_in_reward,
        },
    }
    return {
        **of_objective[train.objective],
        "weights trained": f"LoRA, rank {lora.r}, alpha {lora.alpha:g}, {lora.target_modules}" if lora else "all",
        "optimizer": train.optimizer,
        "learning rate": train.learning_rate,
        "schedule": f"{train.lr_scheduler_type}, warm-up {train.warmup_ratio:g} of the steps",
        f"{objective_of(train).unit}s per step": pairs_per_step(train),
        "epochs": train.num_train_epochs if train.max_steps <= 0 else f"{train.max_steps} steps",
        "gradient norm clipped at": train.max_grad_norm,
        "precision": str(precision_of(config)).removeprefix("torch."),
        "seed": train.seed,
    }
