"""The trained model as a Hugging Face directory: weights, the base's tokenizer files byte for byte, a filled model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import __version__, durable
from pipeline.config import Config
from pipeline.models import copy_tokenizer
from pipeline.runs import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_model(model: PreTrainedModel, base: Path, directory: Path, card: str) -> None:
    """Write `model` (its own precision) beside `base`'s tokenizer files; replaces `directory` in one step."""
    temporary, old = durable.temporary_beside(directory), durable.temporary_beside(directory)
    try:
        with durable.explaining_disk(directory):
            model.save_pretrained(temporary)
            copy_tokenizer(base, temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
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
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [dpo, refscore]"]
    if "/" in base and not Path(base).exists():
        front.append(f"base_model: {base}")
    settings = {
        "loss": train.loss_type,
        "beta": train.beta,
        "label smoothing": train.label_smoothing,
        "learning rate": train.learning_rate,
        "schedule": f"{train.lr_scheduler_type}, warm-up {train.warmup_ratio:g} of the steps",
        "pairs a step": train.per_device_train_batch_size * train.gradient_accumulation_steps,
        "epochs": train.num_train_epochs if train.max_steps <= 0 else f"{train.max_steps} steps",
        "gradient norm clipped at": train.max_grad_norm,
        "precision": train.precision,
        "seed": train.seed,
    }
    shown = {name: f"{value:.4f}" for name, value in results.items() if value is not None}
    return "\n".join(
        [
            *front,
            "---",
            f"# {run}",
            "",
            (
                f"`{base}` trained with direct preference optimization on {pairs} pairs from "
                f"{', '.join(f'`{path}`' for path in config.data.path)}, against stored log-probabilities of the reference "
                f"`{config.reference.model}` (reference_id `{reference_id[:16]}`), with refscore {__version__}."
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
