"""Stage two: train the policy alone against the stored reference scores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pipeline import durable
from pipeline.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.config import Config, differing_fields, digest
from pipeline.errors import CheckError, ConfigError
from pipeline.export import model_card, save_model
from pipeline.forward import forward_of
from pipeline.hardware import device_kind, peak_memory_gib
from pipeline.identity import weights_digest
from pipeline.metrics import Metrics
from pipeline.models import load_causal_lm, load_tokenizer, locate
from pipeline.precompute import is_current, make_plan
from pipeline.runs import Run, read_json, record
from pipeline.schedule import learning_rate, pairs_of_step, total_steps
from pipeline.schema import TRAIN_METRICS, read_about
from pipeline.training import (
    GATE_PAIRS,
    Pairs,
    evaluate,
    load_pairs,
    make_optimizer,
    measure_gate,
    train_step,
    without_dropout,
)
from pipeline.vocabulary import vocabulary_digest
from stages import console
from stages.precompute import show_plan, write_pairs

# fields that change what is shown or kept, not one weight
_UNTRAINED = {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size"}


def run(config: Config, run: Run, *, restart: bool) -> None:
    """Check the inputs; gate; loop over batch, loss, step, log; save the model."""
    train = config.train
    _ensure_pairs(config, run)
    about = read_about(run.pairs)
    base = locate(config.policy)
    _must_share_vocabulary(base, config, about)
    training = _training_digest(config, about, base)
    checkpoint = _decide(run, config, training, restart=restart)
    if checkpoint == "done":
        console.say(f"nothing to train: {run.model} is the result of this very configuration (--restart trains again)")
        return

    # load
    pairs, held_out = load_pairs(run.pairs, "train"), load_pairs(run.pairs, "eval")
    steps = total_steps(len(pairs), train)
    torch.manual_seed(train.seed)
    model = load_causal_lm(base, config.policy, torch.float32).to(device_kind())
    without_dropout(model)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, train)
    precision = torch.float32 if train.precision == "float32" else torch.bfloat16
    forward = forward_of(model, train.layout, precision)
    first = 0
    if isinstance(checkpoint, Checkpoint):
        load_checkpoint(checkpoint, model, optimizer)
        first = checkpoint.step
        console.say(f"resuming after step {first} from {checkpoint.directory}")
    else:
        # what a training that was killed before its first checkpoint left behind
        shutil.rmtree(run.tensorboard, ignore_errors=True)
    metrics = Metrics(run.metrics, run.tensorboard, resumed_at=first or None)
    console.say(f"pairs     {len(pairs)} train, {len(held_out)} eval; {steps} steps of {_pairs_text(config)}")

    # before
    if first == 0:
        _gate(config, run, about, base, forward, model, pairs)
        _evaluate(metrics, 0, forward, model, held_out, config)

    # loop
    model.train()
    with console.progress("training", steps - first) as ticker:
        pending: list[dict[str, float]] = []
        tokens, since = 0, time.monotonic()
        for step in range(first, steps):
            rows = pairs_of_step(step, len(pairs), train)
            found = train_step(forward, pairs, rows, train)
            rate = learning_rate(step, steps, train)
            found["grad_norm"] = _update(model, optimizer, rate, train.max_grad_norm)
            pending.append(found)
            tokens += sum(len(pairs.trees[row]) for row in rows)
            done = step + 1
            if done % train.logging_steps == 0 or done == steps:
                values = {name: sum(row[name] for row in pending) / len(pending) for name in pending[0]}
                values["learning_rate"] = rate
                values["tokens_per_second"] = tokens / (time.monotonic() - since)
                values["peak_memory_gib"] = peak_memory_gib()
                metrics.add(done, values)
                pending, tokens, since = [], 0, time.monotonic()
            ticker.advance(1, _line(values if not pending else found))
            if done == steps or (train.eval_steps and done % train.eval_steps == 0):
                _evaluate(metrics, done, forward, model, held_out, config)
                since = time.monotonic()
            if done == steps or (train.save_steps and done % train.save_steps == 0):
                metrics.flush()
                save_checkpoint(run.checkpoints, done, training, model, optimizer, train.save_total_limit)
                since = time.monotonic()
    metrics.close()

    # write
    results = {f"eval_{name}": metrics.last(f"eval_{name}") for name in TRAIN_METRICS}
    card = model_card(config, run.name, about["reference_id"], len(pairs), results)
    save_model(model, base, run.model, card)
    record(run, config, "train", training=training, steps=steps, pairs=len(pairs), results=results)
    for name, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        before, after = metrics.first(f"eval_{name}"), metrics.last(f"eval_{name}")
        if before is not None and after is not None:
            console.say(f"held-out  {label} {before:.4f} -> {after:.4f}")
    console.say(f"model     {run.model}")


def _ensure_pairs(config: Config, run: Run) -> None:
    """Make pairs.parquet fit the configuration, from the store alone."""
    if is_current(run.pairs, config):
        return
    plan = make_plan(config)
    if plan.missing:
        raise ConfigError(
            f"{len(plan.missing)} of {plan.sequences} sequences have no stored score for reference "
            f"{plan.identity.reference_id[:12]}: run 'refscore precompute' with the same configuration and run first"
        )
    show_plan(plan)
    write_pairs(plan, config, run)


def _must_share_vocabulary(base: Path, config: Config, about: dict[str, Any]) -> None:
    if vocabulary_digest(load_tokenizer(base, config.policy)) != about["vocabulary"]:
        raise ConfigError(
            f"policy.model {config.policy.model!r} has another vocabulary than reference.model {config.reference.model!r}: "
            "a token id does not mean the same to both, so they cannot be compared"
        )


def _training_digest(config: Config, about: dict[str, Any], base: Path) -> str:
    inputs = {name: about[name] for name in ("reference_id", "inputs_digest", "source_digests")}
    return digest(config.train.model_dump(mode="json", exclude=_UNTRAINED), {**inputs, "policy": weights_digest(base)})


def _decide(run: Run, config: Config, training: str, *, restart: bool) -> Checkpoint | str | None:
    """The checkpoint to go on from, "done", or None to begin; refuses to mix two trainings in one run."""
    if restart:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        shutil.rmtree(run.model, ignore_errors=True)
        shutil.rmtree(run.tensorboard, ignore_errors=True)
        run.metrics.unlink(missing_ok=True)
        return None
    finished = read_json(run.provenance).get("stages", {}).get("train", {}).get("training")
    if finished == training and (run.model / "config.json").is_file():
        return "done"
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None and finished is None:
        return None
    if checkpoint is not None and checkpoint.training == training:
        return checkpoint
    saved = read_json(run.directory / "training.json").get("config", {})
    now = _trained_fields(config)
    fields = "; ".join(differing_fields(saved, now)) or "the data, the reference's scores or the policy's weights"
    raise ConfigError(
        f"run {run.name!r} already holds a training with other settings ({fields}). "
        "Give this one a name of its own (--run NAME), or replace the old one (--restart)"
    )


def _trained_fields(config: Config) -> dict[str, Any]:
    return {
        "data": config.data.model_dump(mode="json"),
        "reference": config.reference.model_dump(mode="json"),
        "policy": config.policy.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", exclude=_UNTRAINED),
    }


def _gate(config: Config, run: Run, about: dict[str, Any], base: Path, forward: Any, model: Any, pairs: Pairs) -> None:
    durable.write_json(run.directory / "training.json", {"config": _trained_fields(config)})
    if weights_digest(base) != about["weights_digest"]:
        durable.write_json(
            run.gate, {"applies": False, "reason": "the policy does not start from the reference's weights"}
        )
        console.say("gate      does not apply: the policy does not start from the reference's weights")
        return
    model.eval()
    precise = config.train.precision == "float32" and about.get("dtype") == "float32"
    rows = list(range(min(GATE_PAIRS, len(pairs))))
    figures = measure_gate(forward, pairs, rows, "float32" if precise else "bfloat16", config.train.beta)
    durable.write_json(run.gate, figures)
    text = (
        f"policy against stored reference on {figures['tokens']} tokens: mean difference "
        f"{figures['mean_signed_difference']:+.5f}, mean absolute {figures['mean_absolute_difference']:.5f} nats a token; "
        f"margin noise {figures['margin_noise_nats']:.3f} nats = {figures['margin_noise_reward']:.4f} reward"
    )
    if not figures["passed"]:
        raise CheckError(
            f"the gate is closed: {text}; allowed are {figures['tolerance_mean_signed']} and "
            f"{figures['tolerance_mean_absolute']}. The policy starts from the reference's weights, so both must agree: "
            "the stored scores belong to other token ids, or one of the two forward passes is wrong. "
            "'refscore verify' re-scores a sample; figures are in " + str(run.gate)
        )
    console.say(f"gate      passed: {text}")


def _evaluate(metrics: Metrics, step: int, forward: Any, model: Any, held_out: Pairs, config: Config) -> None:
    if not len(held_out):
        return
    model.eval()
    values = evaluate(forward, held_out, config.train)
    model.train()
    metrics.add(step, values, prefix="eval_")
    console.say(
        f"step {step}: held-out loss {values['loss']:.4f}, margin {values['rewards/margins']:.3f}, "
        f"accuracy {values['rewards/accuracies']:.3f}"
    )


def _update(model: Any, optimizer: torch.optim.Optimizer, rate: float, max_norm: float) -> float:
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _line(values: dict[str, float]) -> str:
    text = f"loss {values['loss']:.4f}  margin {values['rewards/margins']:.3f}  accuracy {values['rewards/accuracies']:.2f}"
    if "tokens_per_second" in values:
        text += f"  {values['tokens_per_second']:.0f} tokens/s  {values['peak_memory_gib']:.1f} GiB"
    return text


def _pairs_text(config: Config) -> str:
    train = config.train
    return f"{train.gradient_accumulation_steps} x {train.per_device_train_batch_size} pairs"
