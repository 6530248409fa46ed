"""Stage two, whole: check the inputs, pass the gate, loop over batch, loss, step and log, save the model.

Training reads pairs.parquet and the policy; it never opens the reference model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json, record
from pipeline.artifacts.tables import TRAIN_METRICS, read_about
from pipeline.artifacts.writer import writing
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind, peak_memory_gib, return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.identity import identify_model
from pipeline.models.load import load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate
from pipeline.precompute.pairs_file import ensure_pairs
from pipeline.progress import SILENT, Listener
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, load_policy_logps, save_checkpoint
from pipeline.training.checks import health
from pipeline.training.checks.gate import check_gate
from pipeline.training.examples import Pairs, load_pairs, tokens_in_a_pass
from pipeline.training.lean import StepInBackward, offloaded_activations
from pipeline.training.metrics import Metrics
from pipeline.training.optimizers import make_optimizer, numbers, update
from pipeline.training.parallel.sharded import Shards, mesh_of, must_be_shardable
from pipeline.training.parallel.world import ALONE, Followed, World
from pipeline.training.policies import Policy, load_policy
from pipeline.training.policy_logps import PolicyLogps
from pipeline.training.resume import decide, trained_fields, training_digest
from pipeline.training.save import model_card, save_policy
from pipeline.training.schedule import (
    SAVE_STEPS,
    checkpoint_is_due,
    is_due,
    learning_rate,
    pairs_of_step,
    pairs_per_step,
    total_steps,
)
from pipeline.training.step import NotFinite, accumulate, evaluate, must_be_finite
from pipeline.training.trackers import open_trackers

# taking memory from the system again costs the step that follows a sixth of its time
_STEPS_TO_RETURN_MEMORY = 8


@dataclass(frozen=True)
class Trained:
    """What a training made: its steps, and held-out means of TRAIN_METRICS after the last one, by name with `eval_`."""

    steps: int
    results: dict[str, float | None]


def train(
    config: Config, run: Run, *, restart: bool = False, listener: Listener = SILENT, world: World = ALONE
) -> Trained | None:
    """Train the policy on the run's pairs and save it; goes on after the last checkpoint of the same training.

    None if the run already holds the result of this very configuration. `restart` throws an earlier training away. `world`: the
    processes that call this together; the first one writes the run.
    Raises ConfigError if the inputs do not fit together, CheckError if the gate is closed, a loss is not finite, or what
    was saved is not what was trained.
    """
    with writing(run) if world.first else nullcontext():
        return _train(config, run, restart, listener, world)


def _train(config: Config, run: Run, restart: bool, listener: Listener, world: World) -> Trained | None:  # noqa: FBT001
    if not world.alone:
        must_be_shardable(config, world)
    found = world.once(lambda: _begin(config, run, restart, listener))
    if found is None:
        return None
    training, checkpoint = found["training"], _checkpoint_of(run, found)
    about = read_about(run.pairs)
    base = locate(config.policy)
    tokenizer = load_tokenizer(base, config.policy)

    scored = not reference_free(config.train)
    by_token = scored and config.train.ld_alpha is not None
    pairs, held_out = (load_pairs(run.pairs, split, scored=scored, by_token=by_token) for split in ("train", "eval"))
    _must_fit_positions(base, config, pairs, held_out)
    steps = total_steps(len(pairs), config.train)
    torch.manual_seed(config.train.seed)
    policy, shards = _policy(base, config, tokenizer, pairs, world)
    optimizer = make_optimizer(shards.module() if shards else policy.model, config.train)
    if config.train.optimizer_in_backward:
        _must_be_single_passes(policy, pairs, config.train, steps)
    first, logps = 0, PolicyLogps(run.policy_logps, pairs, held_out)
    if checkpoint is not None:
        if shards is not None:
            shards.load(checkpoint, optimizer)
        else:
            load_checkpoint(checkpoint, policy.model, optimizer)
        logps.load(load_policy_logps(checkpoint))
        first = checkpoint.step
        listener.say(f"resuming after step {first} from {checkpoint.directory}")
    elif world.first:
        # what a training that was killed before its first checkpoint left behind
        shutil.rmtree(run.tensorboard, ignore_errors=True)
        run.policy_logps.unlink(missing_ok=True)
    # each beginning is counted, so that what shows metrics tells one from another of the same settings
    begun = int(read_json(run.training).get("begun", 0)) + (first == 0)
    shown = config.train.report_to if world.first else []
    trackers = open_trackers(shown, run, f"{training[:8]}-{begun}", trained_fields(config), first or None)
    metrics = Metrics(run.metrics if world.first else None, trackers, resumed_at=first or None)
    listener.say(
        f"pairs     {len(pairs)} train, {len(held_out)} eval; {steps} steps of {pairs_per_step(config.train)} pairs"
    )
    if policy.adapted is not None:
        learning = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
        listener.say(f"adapters  {learning / 1e6:.2f} M of {policy.model.num_parameters() / 1e6:.1f} M weights learn")
    if first == 0:
        if world.first:
            durable.write_json(run.training, {"steps": steps, "config": trained_fields(config), "begun": begun})
        check_gate(config, run, about, base, policy, pairs, listener, world)

    in_backward = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
    loop = _Loop(
        config,
        run,
        training,
        policy,
        optimizer,
        in_backward,
        pairs,
        held_out,
        metrics,
        logps,
        steps,
        listener,
        shards,
        world,
    )
    loop.run(first)
    metrics.close()
    optimizer.state.clear()  # a second model is loaded to be compared
    if shards is not None:
        policy = _whole(shards, policy, world, lambda: load_policy(base, config, tokenizer, pairs.ends, waits=True))
    results = {f"eval_{name}": metrics.last(f"eval_{name}") for name in TRAIN_METRICS}
    world.once(lambda: _finish(loop, policy, base, tokenizer, about["reference_id"], results))
    return Trained(steps, results)


def _begin(config: Config, run: Run, restart: bool, listener: Listener) -> dict[str, Any] | None:  # noqa: FBT001
    """Make the pairs fit, and decide where to begin: the training's digest, and the checkpoint's directory and step if there is
    one; None if nothing is to be done.
    """
    ensure_pairs(config, run, listener)
    about, base = read_about(run.pairs), locate(config.policy)
    if vocabulary_digest(load_tokenizer(base, config.policy)) != about["vocabulary"]:
        raise ConfigError(
            f"policy.model {config.policy.model!r} has another vocabulary than reference.model {config.reference.model!r}: "
            "a token id does not mean the same to both, so they cannot be compared"
        )
    training = training_digest(config, about, base)
    checkpoint = decide(run, config, training, restart=restart)
    if checkpoint == "done":
        trained = run.model if run.model.is_dir() else run.adapter
        listener.say(f"nothing to train: {trained} is the result of this very configuration (--restart trains again)")
        return None
    if not isinstance(checkpoint, Checkpoint):
        return {"training": training}
    return {"training": training, "checkpoint": checkpoint.directory.name, "step": checkpoint.step}


def _checkpoint_of(run: Run, found: dict[str, Any]) -> Checkpoint | None:
    if "checkpoint" not in found:
        return None
    return Checkpoint(run.checkpoints / found["checkpoint"], found["step"], found["training"])


def _policy(base: Path, config: Config, tokenizer: Any, pairs: Pairs, world: World) -> tuple[Policy, Shards | None]:
    """The policy, in shards if several processes train it; on each machine one process after the other holds it whole."""
    if world.alone:
        return load_policy(base, config, tokenizer, pairs.ends), None
    mesh = mesh_of(world)

    def in_shards() -> tuple[Policy, Shards]:
        policy = load_policy(base, config, tokenizer, pairs.ends, waits=True)
        shards = Shards(policy.model, policy.forward, world, mesh)
        return_freed_memory()
        return replace(policy, forward=shards.forward), shards

    return world.in_turn(in_shards)


def _whole(shards: Shards, policy: Policy, world: World, load: Callable[[], Policy]) -> Policy:
    """The trained policy in one piece in the first process; the others keep their parts."""
    fresh = load() if world.first else policy
    weights = dict(fresh.model.named_parameters()) if world.first else {}
    for name, whole in shards.whole_weights():
        if world.first:
            weights[name].data.copy_(whole)
    return fresh


def _finish(
    loop: _Loop, policy: Policy, base: Path, tokenizer: Any, reference_id: str, results: dict[str, float | None]
) -> None:
    """Save the policy, and write down what the training came to."""
    config, run, pairs, metrics, say = loop.config, loop.directories, loop.pairs, loop.metrics, loop.listener.say
    loop.logps.write()
    sentences = [finding.sentence for finding in health.findings(metrics.rows(), config.train, loop.steps)]
    durable.write_json(run.health, {"words": sentences})
    card = model_card(config, run.name, reference_id, len(pairs), results)
    differences = save_policy(policy, base, config, run, card, tokenizer, pairs.trees)
    policy_digest = identify_model(base, trusts_code=config.policy.trust_remote_code).digest
    facts = {
        "training": loop.training,
        "policy": policy_digest,
        "steps": loop.steps,
        "pairs": len(pairs),
        "results": results,
    }
    record(run, config, "train", **facts, export_check=differences)
    for name, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        before, after = metrics.first(f"eval_{name}"), metrics.last(f"eval_{name}")
        if before is not None and after is not None:
            say(f"held-out  {label} {before:.4f} -> {after:.4f}")
    if policy.adapted is not None:
        say(f"adapter   {run.adapter}")
    if run.model.is_dir():
        say(f"model     {run.model}")


@dataclass(frozen=True)
class _Loop:
    """The steps of one training, and all that is written while they run."""

    config: Config
    directories: Run
    training: str
    policy: Policy
    optimizer: torch.optim.Optimizer
    in_backward: StepInBackward | None
    pairs: Pairs
    held_out: Pairs
    metrics: Metrics
    logps: PolicyLogps
    steps: int
    listener: Listener
    shards: Shards | None
    world: World

    def run(self, first: int) -> None:
        """Take the steps from `first` (0-based) on."""
        train = self.config.train
        if first == 0:
            self._evaluate(0)
        self.policy.model.train()
        kinds_said: set[str] = set()
        with self.listener.progress("training", self.steps, first) as ticker:
            pending: list[dict[str, float]] = []
            tokens, since = 0, time.monotonic()
            saved, writing = since, 0.0
            for step in range(first, self.steps):
                rows = pairs_of_step(step, len(self.pairs), train)
                rate = learning_rate(step, self.steps, train)
                done = step + 1
                values = self._step(done, rows, rate)
                if done % _STEPS_TO_RETURN_MEMORY == 0:
                    return_freed_memory()
                pending.append(values)
                tokens += sum(len(self.pairs.trees[row]) for row in rows)
                if done % train.logging_steps == 0 or done == self.steps:
                    values = {name: sum(row[name] for row in pending) / len(pending) for name in pending[0]}
                    seconds = time.monotonic() - since
                    values["learning_rate"] = rate
                    values["step_seconds"] = seconds / len(pending)
                    values["tokens_per_second"] = tokens / seconds
                    values["peak_memory_gib"] = peak_memory_gib()
                    self.metrics.add(done, values)
                    pending, tokens, since = [], 0, time.monotonic()
                ticker.advance(1, _line(values))
                if done == self.steps or is_due(done, train.eval_steps):
                    self._evaluate(done)
                    self._say_findings(kinds_said)
                    since = time.monotonic()
                idle = time.monotonic() - saved
                if done == self.steps or self._is_due(done, idle, writing):
                    started = time.monotonic()
                    self.metrics.flush()
                    if self.world.first:
                        self.logps.write()
                    self._save(done)
                    since = saved = time.monotonic()
                    writing = since - started

    def _is_due(self, done: int, idle: float, writing: float) -> bool:
        save_steps = self.config.train.save_steps
        # by the clock of the first process
        by_time = save_steps is None and is_due(done, SAVE_STEPS)
        due: bool = (
            self.world.once(lambda: checkpoint_is_due(done, save_steps, idle, writing))
            if by_time
            else checkpoint_is_due(done, save_steps, idle, writing)
        )
        return due

    def _save(self, done: int) -> None:
        root, kept = self.directories.checkpoints, self.config.train.save_total_limit
        whole = self.shards.state(self.optimizer) if self.shards else None
        self.world.once(lambda: self._write(root, done, kept, whole))

    def _write(self, root: Path, done: int, kept: int, whole: Any) -> None:
        save_checkpoint(root, done, self.training, self.policy.model, self.optimizer, kept, self.logps.state(), whole)

    def _step(self, number: int, rows: list[int], rate: float) -> dict[str, float]:
        """Take step `number` (1-based) on `rows` at the learning rate `rate`; means of TRAIN_METRICS and the gradient's norm."""
        train = self.config.train
        try:
            if self.in_backward is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
            with offloaded_activations(self.policy.model) if train.activation_offloading else nullcontext():
                means = accumulate(self.policy.forward, self.pairs, rows, train, self.logps.note, self.world)
            if self.in_backward is None:
                clipping = self.shards.clip if self.shards else None
                values = update(self.policy.model, self.optimizer, rate, train.max_grad_norm, means, clipping)
            else:
                values = numbers({**means, "grad_norm": self.in_backward.grad_norm()})
            must_be_finite(values, self.pairs, rows, train)
            self.logps.keep_step(number - 1)
        except NotFinite as stop:
            self.metrics.close()
            if not self.world.first:
                raise Followed(stop.exit_code) from None
            self.logps.write()
            path = self.directories.directory / "not_finite.json"
            durable.write_json(path, {"step": number, "problem": str(stop), "pair_ids": stop.pair_ids})
            metrics = self.directories.metrics
            self.listener.say(f"step {number}: the pairs are kept in {path}; metrics up to here in {metrics}")
            raise
        return values

    def _evaluate(self, step: int) -> None:
        if not len(self.held_out):
            return
        self.policy.model.eval()
        values = evaluate(self.policy.forward, self.held_out, self.config.train, self.logps.note, self.world)
        self.logps.keep_evaluation(step)
        self.policy.model.train()
        self.metrics.add(step, values, prefix="eval_")
        self.listener.say(
            f"step {step}: held-out loss {values['loss']:.4f}, margin {values['rewards/margins']:.3f}, "
            f"accuracy {values['rewards/accuracies']:.3f}"
        )

    def _say_findings(self, kinds_said: set[str]) -> None:
        """Say what looks wrong, each kind once."""
        for finding in health.findings(self.metrics.rows(), self.config.train, self.steps):
            if finding.kind not in kinds_said:
                kinds_said.add(finding.kind)
                self.listener.say(f"health    {finding.sentence}")


def _must_be_single_passes(policy: Policy, pairs: Pairs, train: TrainConfig, steps: int) -> None:
    """Raise ConfigError if a step needs more than one forward pass: the gradients of the first would have to be kept."""
    budget = tokens_in_a_pass(train, device_kind())
    needed = max(
        policy.forward.tokens([pairs.trees[row] for row in pairs_of_step(step, len(pairs), train)])
        for step in range(steps)
    )
    if needed > budget:
        raise ConfigError(
            f"train.optimizer_in_backward keeps no gradients, so a step must be one forward pass: the largest has {needed} "
            f"tokens, train.tokens_per_batch is {budget}. Set train.tokens_per_batch={needed}, or fewer pairs per step "
            "(train.per_device_train_batch_size, train.gradient_accumulation_steps)"
        )


def _must_fit_positions(base: Path, config: Config, *splits: Pairs) -> None:
    limit = position_limit(base)
    longest = max(pairs.longest for pairs in splits)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"the longest pair has {longest} tokens, policy.model {config.policy.model!r} reads {limit}: set "
            f"data.max_length={limit} or less, run precompute again (nothing is scored twice), or choose another policy"
        )


def _line(values: dict[str, float]) -> str:
    text = f"loss {values['loss']:.4f}  margin {values['rewards/margins']:.3f}  accuracy {values['rewards/accuracies']:.2f}"
    if "tokens_per_second" in values:
        text += f"  {values['tokens_per_second']:.0f} tokens/s  {values['peak_memory_gib']:.1f} GiB"
    return text
