"""Stage two: train the policy alone against the stored reference scores."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import TRAIN_METRICS, read_about
from pipeline.config.experiment import Config, without_reference
from pipeline.config.losses import reference_free
from pipeline.errors import CheckError, ConfigError
from pipeline.forward.logps import Forward
from pipeline.hardware import peak_memory_gib, return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.identity import identify_model, weights_digest
from pipeline.models.load import load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate
from pipeline.precompute.pairs_file import is_current
from pipeline.precompute.plan import make_plan
from pipeline.training import health
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.training.gate import GATE_PAIRS, measure_gate
from pipeline.training.metrics import Metrics
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.policies import Policy, load_policy, precision_of
from pipeline.training.resume import decide, trained_fields, training_digest
from pipeline.training.save import model_card, save_policy
from pipeline.training.schedule import learning_rate, pairs_of_step, total_steps
from pipeline.training.step import NotFinite, Pairs, evaluate, load_pairs, train_step
from stages import console
from stages.precompute import show_plan, write_pairs, write_unscored

# taking memory from the system again costs the step that follows a sixth of its time
_STEPS_TO_RETURN_MEMORY = 8


def run(config: Config, run: Run, *, restart: bool) -> None:
    """Check the inputs; gate; loop over batch, loss, step, log; save the model."""
    train = config.train
    _ensure_pairs(config, run)
    about = read_about(run.pairs)
    base = locate(config.policy)
    _must_share_vocabulary(base, config, about)
    training = training_digest(config, about, base)
    checkpoint = decide(run, config, training, restart=restart)
    if checkpoint == "done":
        made = run.model if run.model.is_dir() else run.adapter
        console.say(f"nothing to train: {made} is the result of this very configuration (--restart trains again)")
        return

    # load
    scored = not reference_free(train)
    pairs, held_out = (load_pairs(run.pairs, split, scored=scored) for split in ("train", "eval"))
    _must_fit_positions(base, config, pairs, held_out)
    steps = total_steps(len(pairs), train)
    torch.manual_seed(train.seed)
    tokenizer = load_tokenizer(base, config.policy)
    policy = load_policy(base, config, tokenizer, {branch[-1] for tree in pairs.trees for branch in tree.branches})
    model, forward = policy.model, policy.forward
    optimizer = make_optimizer(model, train)
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
    if policy.adapted is not None:
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        console.say(f"adapters  {learning / 1e6:.2f} M of {model.num_parameters() / 1e6:.1f} M weights learn")

    # before
    if first == 0:
        durable.write_json(run.directory / "training.json", {"config": trained_fields(config)})
        _gate(config, run, about, base, policy, pairs)
        _evaluate(metrics, 0, policy, held_out, config)

    # loop
    model.train()
    said: list[str] = []
    with console.progress("training", steps - first) as ticker:
        pending: list[dict[str, float]] = []
        tokens, since = 0, time.monotonic()
        for step in range(first, steps):
            rows = pairs_of_step(step, len(pairs), train)
            rate = learning_rate(step, steps, train)
            try:
                found = train_step(forward, pairs, rows, train)
                found["grad_norm"] = update(model, optimizer, rate, train.max_grad_norm)
                if not math.isfinite(found["grad_norm"]):
                    raise NotFinite("gradient norm", found["grad_norm"], [pairs.pair_ids[row] for row in rows])
            except NotFinite as stop:
                _keep_not_finite(run, step + 1, stop, metrics)
                raise
            if (step + 1) % _STEPS_TO_RETURN_MEMORY == 0:
                return_freed_memory()
            pending.append(found)
            tokens += sum(len(pairs.trees[row]) for row in rows)
            done = step + 1
            if done % train.logging_steps == 0 or done == steps:
                values = {name: sum(row[name] for row in pending) / len(pending) for name in pending[0]}
                seconds = time.monotonic() - since
                values["learning_rate"] = rate
                values["step_seconds"] = seconds / len(pending)
                values["tokens_per_second"] = tokens / seconds
                values["peak_memory_gib"] = peak_memory_gib()
                metrics.add(done, values)
                pending, tokens, since = [], 0, time.monotonic()
            ticker.advance(1, _line(values if not pending else found))
            if done == steps or (train.eval_steps and done % train.eval_steps == 0):
                _evaluate(metrics, done, policy, held_out, config)
                _say_health(metrics, config, steps, said)
                since = time.monotonic()
            if done == steps or (train.save_steps and done % train.save_steps == 0):
                metrics.flush()
                save_checkpoint(run.checkpoints, done, training, model, optimizer, train.save_total_limit)
                since = time.monotonic()
    metrics.close()

    # write
    durable.write_json(run.health, {"words": health.words(metrics.rows(), train, steps)})
    results = {f"eval_{name}": metrics.last(f"eval_{name}") for name in TRAIN_METRICS}
    card = model_card(config, run.name, about["reference_id"], len(pairs), results)
    optimizer.state.clear()  # a second model is loaded to be compared
    exported = save_policy(policy, base, config, run, card, tokenizer, pairs.trees)
    facts = {"training": training, "steps": steps, "pairs": len(pairs), "results": results, "export_check": exported}
    record(run, config, "train", **facts)
    for name, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        before, after = metrics.first(f"eval_{name}"), metrics.last(f"eval_{name}")
        if before is not None and after is not None:
            console.say(f"held-out  {label} {before:.4f} -> {after:.4f}")
    if policy.adapted is not None:
        console.say(f"adapter   {run.adapter}")
    if run.model.is_dir():
        console.say(f"model     {run.model}")


def _ensure_pairs(config: Config, run: Run) -> None:
    """Make pairs.parquet fit the configuration, from the store alone."""
    if reference_free(config.train):
        current = is_current(run.pairs, config) or is_current(run.pairs, without_reference(config), scored=False)
        if not current:
            write_unscored(config, run)
        return
    if is_current(run.pairs, config):
        return
    plan = make_plan(config)
    if len(plan.missing):
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


def _must_fit_positions(base: Path, config: Config, *splits: Pairs) -> None:
    limit = position_limit(base)
    longest = max((tree.longest for pairs in splits for tree in pairs.trees), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"the longest pair has {longest} tokens, policy.model {config.policy.model!r} reads {limit}: set "
            f"data.max_length={limit} or less, run precompute again (nothing is scored twice), or choose another policy"
        )


def _gate(config: Config, run: Run, about: dict[str, Any], base: Path, policy: Policy, pairs: Pairs) -> None:
    reason = None
    if reference_free(config.train):
        reason = "nothing is compared with the reference"
    elif weights_digest(base) != about["weights_digest"]:
        reason = "the policy does not start from the reference's weights"
    if reason:
        durable.write_json(run.gate, {"applies": False, "reason": reason})
        console.say(f"gate      does not apply: {reason}")
        return
    if not isinstance(policy.forward, Forward):
        return  # a reward model compares nothing with the reference, as was said above
    policy.model.eval()
    precise = precision_of(config.train) == torch.float32 and about.get("dtype") == "float32"
    rows = list(range(min(GATE_PAIRS, len(pairs))))
    numerics = "float32" if precise else "bfloat16"
    figures = measure_gate(policy.forward, pairs, rows, numerics, config.train.beta)
    text = (
        f"policy against stored reference on {figures['tokens']} tokens: mean difference "
        f"{figures['mean_signed_difference']:+.5f}, mean absolute {figures['mean_absolute_difference']:.5f} nats a token; "
        f"margin noise {figures['margin_noise_nats']:.3f} nats = {figures['margin_noise_reward']:.4f} reward"
    )
    if config.policy.load_in_4bit:
        reason = "the policy's base has 4 bits, the reference has not"
    elif about.get("model") != identify_model(base, trusts_code=config.policy.trust_remote_code).digest:
        reason = "the policy has the reference's weights, but not its configuration or its code"
    if reason:
        durable.write_json(run.gate, {**figures, "applies": False, "reason": reason})
        console.say(f"gate      does not apply ({reason}): {text}")
        return
    durable.write_json(run.gate, figures)
    if not figures["passed"]:
        raise CheckError(
            f"the gate is closed: {text}; allowed are {figures['tolerance_mean_signed']} and "
            f"{figures['tolerance_mean_absolute']}. The policy starts from the reference's weights, so both must agree: "
            "the stored scores belong to other token ids, or one of the two forward passes is wrong. "
            "'refscore verify' re-scores a sample; figures are in " + str(run.gate)
        )
    console.say(f"gate      passed: {text}")


def _evaluate(metrics: Metrics, step: int, policy: Policy, held_out: Pairs, config: Config) -> None:
    if not len(held_out):
        return
    policy.model.eval()
    values = evaluate(policy.forward, held_out, config.train)
    policy.model.train()
    metrics.add(step, values, prefix="eval_")
    console.say(
        f"step {step}: held-out loss {values['loss']:.4f}, margin {values['rewards/margins']:.3f}, "
        f"accuracy {values['rewards/accuracies']:.3f}"
    )


def _say_health(metrics: Metrics, config: Config, steps: int, said: list[str]) -> None:
    """Say what looks sick, each thing once."""
    for sentence in health.words(metrics.rows(), config.train, steps):
        kind = sentence.split("(")[0][:24]
        if kind not in said:
            said.append(kind)
            console.say(f"health    {sentence}")


def _keep_not_finite(run: Run, step: int, stop: NotFinite, metrics: Metrics) -> None:
    metrics.close()
    path = run.directory / "not_finite.json"
    durable.write_json(path, {"step": step, "problem": str(stop), "pair_ids": stop.pair_ids})
    console.say(f"step {step}: the pairs are kept in {path}; metrics up to here in {run.metrics}")


def _line(values: dict[str, float]) -> str:
    text = f"loss {values['loss']:.4f}  margin {values['rewards/margins']:.3f}  accuracy {values['rewards/accuracies']:.2f}"
    if "tokens_per_second" in values:
        text += f"  {values['tokens_per_second']:.0f} tokens/s  {values['peak_memory_gib']:.1f} GiB"
    return text


def _pairs_text(config: Config) -> str:
    train = config.train
    return f"{train.gradient_accumulation_steps} x {train.per_device_train_batch_size} pairs"
