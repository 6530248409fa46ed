"""Which training a run holds: its digest, the checkpoint to go on from, and what differs from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.artifacts.runs import Run, finished_stages, read_json
from pipeline.config.experiment import Config
from pipeline.config.files import differing_fields, digest
from pipeline.errors import ConfigError
from pipeline.models.identity import identify_model
from pipeline.training.checkpoint import Checkpoint, newest_checkpoint
from pipeline.training.policies import precision_of

# fields that change what is shown or kept, not one weight
_UNTRAINED = {
    "logging_steps", "eval_steps", "save_steps", "save_total_limit", "async_save", "per_device_eval_batch_size", "report_to",
}  # fmt: skip
# fields of `policy_gradient` that go with a critic alone
_OF_GAE = {"gae_lambda", "gae_gamma", "critic_learning_rate"}
# of `policy_gradient`, what decides the rewards that a critic learns
_OF_CRITIC = ("kl_in_reward", "gae_gamma", "mask_truncated_completions")


def training_digest(config: Config, about: dict[str, Any], base: Path) -> str:
    """Digest of all that decides the trained weights: settings, pairs and scores, and the policy at `base`.

    `about`: what pairs.parquet, or rollouts.parquet, says of itself.
    """
    # samples have a key besides, as the same settings may be sampled again
    names = ["reference_id", "inputs_digest", "source_digests", *(["key"] if "key" in about else [])]
    if config.train.objective == "policy_gradient" and config.train.policy_gradient.reads_values:
        names.append("critic")
    inputs = {name: about[name] for name in names}
    trained = {
        "policy": identify_model(base, trusts_code=config.policy.trust_remote_code).digest,
        **config.policy.model_dump(mode="json", include={"lora", "load_in_4bit"}),
    }
    return digest(_train_fields(config), {**inputs, **trained})


def decide(run: Run, config: Config, training: str, *, restart: bool) -> Checkpoint | str | None:
    """The checkpoint to go on from, "done", or None to begin; refuses to mix two trainings in one run."""
    if restart:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        shutil.rmtree(run.model, ignore_errors=True)
        shutil.rmtree(run.adapter, ignore_errors=True)
        shutil.rmtree(run.tensorboard, ignore_errors=True)
        run.metrics.unlink(missing_ok=True)
        run.policy_logps.unlink(missing_ok=True)
        return None
    finished = finished_stages(run).get("train", {}).get("training")
    results = [run.model / "config.json", run.adapter / "adapter_config.json"]
    needed = results[1:] if config.policy.lora and not config.policy.lora.merge else results[:1]
    if finished == training and all(path.is_file() for path in needed):
        return "done"
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None and finished is None:
        return None
    if checkpoint is not None and checkpoint.training == training:
        return checkpoint
    saved = read_json(run.training).get("config", {})
    now = trained_fields(config)
    others = "the samples or their rewards" if config.train.on_samples else "the data or the reference's scores"
    fields = "; ".join(differing_fields(saved, now)) or f"{others}, or the policy's weights"
    raise ConfigError(
        f"run {run.name!r} already holds a training with other settings ({fields}). "
        "Give this one a name of its own (--run NAME), or replace the old one (--restart)"
    )


def trained_fields(config: Config) -> dict[str, Any]:
    """The settings of a training, kept in the run so that a later one can name what differs."""
    return {
        "data": config.data.deciding(),
        "reference": config.reference.model_dump(mode="json"),
        "policy": config.policy.model_dump(mode="json"),
        "train": _train_fields(config),
    }


def _train_fields(config: Config) -> dict[str, Any]:
    # auto is another training on another machine
    precision = str(precision_of(config)).removeprefix("torch.")
    # of trainings from before there were others, too
    unread: dict[str, Any] = dict.fromkeys([*_UNTRAINED, "policy_gradient"], True)
    settings = config.train.policy_gradient
    of_critic = {name: getattr(settings, name) for name in _OF_CRITIC} if config.train.objective == "value" else {}
    if config.train.objective == "policy_gradient":
        unread["policy_gradient"] = {"critic_learning_rate"} if settings.reads_values else _OF_GAE
    return config.train.model_dump(mode="json", exclude=unread) | of_critic | {"precision": precision}
