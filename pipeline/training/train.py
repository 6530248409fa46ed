"""Stage two, whole: check the inputs, pass the gate, loop over batch, loss, step and log, save the model.

Training reads pairs.parquet, or rollouts.parquet, and the policy; it never opens the reference model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json, record
from pipeline.artifacts.schemas import TRAIN_METRICS
from pipeline.artifacts.writer import writing
from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.identity import identify_model
from pipeline.models.load import load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate
from pipeline.progress import SILENT, Listener
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, load_policy_logps
from pipeline.training.checks import health
from pipeline.training.checks.export import CHECKED
from pipeline.training.checks.gate import check_gate
from pipeline.training.checks.ratios import check_ratios
from pipeline.training.inputs.batches import Examples, tokens_in_a_pass
from pipeline.training.inputs.open import about_inputs, ensure_inputs, load_inputs, load_state
from pipeline.training.lean import StepInBackward
from pipeline.training.loop import Loop
from pipeline.training.objectives.objective import objective_of
from pipeline.training.optimizers import make_optimizer
from pipeline.training.parallel.export import Exports, can_export_parts
from pipeline.training.parallel.sharded import Shards, mesh_of, must_be_shardable
from pipeline.training.parallel.state import load_parts
from pipeline.training.parallel.unread import NotInParts
from pipeline.training.parallel.world import ALONE, World
from pipeline.training.policies import Policy, load_policy, precision_of
from pipeline.training.records.metrics import Metrics
from pipeline.training.records.policy_logps import PolicyLogps
from pipeline.training.records.trackers import open_trackers
from pipeline.training.resume import decide, trained_fields, training_digest
from pipeline.training.save import model_card, save_policy
from pipeline.training.schedule import (
    pairs_of_step,
    pairs_per_step,
    total_steps,
)


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
    about = about_inputs(config, run)
    base = locate(config.policy)
    tokenizer = load_tokenizer(base, config.policy)

    inputs = load_inputs(config, run)
    pairs, held_out = inputs.examples, inputs.held_out
    _must_fit_positions(base, config, pairs, held_out)
    steps = total_steps(len(pairs), config.train)
    torch.manual_seed(config.train.seed)
    policy, shards = _policy(base, config, tokenizer, pairs, world, listener)
    optimizer = make_optimizer(shards.module() if shards else policy.model, config.train)
    if config.train.optimizer_in_backward:
        _must_be_single_passes(policy, pairs, config.train, steps)
    first, logps = 0, PolicyLogps(run.policy_logps, pairs, held_out)
    if checkpoint is not None:
        if shards is not None:
            load_parts(shards, checkpoint, optimizer, world)
        else:
            load_checkpoint(checkpoint, policy.model, optimizer)
        state = load_policy_logps(checkpoint)
        logps.load(state)
        load_state(pairs, state)
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
    unit = objective_of(config.train).unit
    listener.say(f"{inputs.words}; {steps} steps of {pairs_per_step(config.train)} {unit}s")
    if policy.adapted is not None:
        learning = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
        listener.say(f"adapters  {learning / 1e6:.2f} M of {policy.model.num_parameters() / 1e6:.1f} M weights learn")
    if first == 0:
        if world.first:
            durable.write_json(run.training, {"steps": steps, "config": trained_fields(config), "begun": begun})
        check = check_ratios if config.train.objective == "policy_gradient" else check_gate
        check(config, run, about, base, policy, pairs, listener, world)

    in_backward = StepInBackward(optimizer) if config.train.optimizer_in_backward else None
    loop = Loop(
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
    steps = loop.run(first)
    metrics.close()
    optimizer.state.clear()  # what is exported is read again
    results = {f"eval_{name}": metrics.last(f"eval_{name}") for name in TRAIN_METRICS}
    world.once(lambda: _say_health(loop))
    card = model_card(config, run.name, about["reference_id"], len(pairs), results)
    # of a prompt with many samples a few, as training never reads more in a pass than fit one
    compared = objective_of(config.train).parts(pairs, range(min(CHECKED, len(pairs))))[0].trees
    if shards is not None and can_export_parts(policy):
        differences = Exports(policy, shards, base, config, run, world).save(card, tokenizer, compared)
    else:
        if shards is not None:
            policy = _whole(shards, policy, world, lambda: load_policy(base, config, tokenizer, pairs.ends, "host"))
        differences = world.once(lambda: save_policy(policy, base, config, run, card, tokenizer, compared))
    world.once(lambda: _finish(loop, steps, policy, base, results, differences))
    return Trained(steps, results)


def _begin(config: Config, run: Run, restart: bool, listener: Listener) -> dict[str, Any] | None:  # noqa: FBT001
    """Make the pairs fit, and decide where to begin: the training's digest, and the checkpoint's directory and step if there is
    one; None if nothing is to be done.
    """
    about, base = ensure_inputs(config, run, listener), locate(config.policy)
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


def _policy(
    base: Path, config: Config, tokenizer: Any, pairs: Examples, world: World, listener: Listener
) -> tuple[Policy, Shards | None]:
    """The policy, in shards if several processes train it: then each reads its own parts. If the weights are joined or renamed as
    they are read, on each machine one process after the other holds them whole.
    """
    if world.alone:
        return load_policy(base, config, tokenizer, pairs.ends), None
    mesh, precision = mesh_of(world), precision_of(config)

    def in_shards(policy: Policy) -> tuple[Policy, Shards]:
        shards = Shards(policy.model, policy.forward, world, mesh, precision, policy.unread)
        return_freed_memory()
        return replace(policy, forward=shards.forward, unread=None), shards

    try:
        policy, shards = in_shards(load_policy(base, config, tokenizer, pairs.ends, "parts"))
    except NotInParts as reason:
        if world.first:
            listener.say(f"loading   one process after the other, whole: {reason}")
    else:
        # which needs all processes, as the head was not whole before
        if not config.train.of_scores:
            shards.check_head(policy.model, precision)
        return policy, shards
    # as if nothing had been tried
    torch.manual_seed(config.train.seed)
    return world.in_turn(lambda: in_shards(load_policy(base, config, tokenizer, pairs.ends, "host")))


def _whole(shards: Shards, policy: Policy, world: World, load: Callable[[], Policy]) -> Policy:
    """The trained policy in one piece in the first process; the others keep their parts."""
    fresh = load() if world.first else policy
    weights = dict(fresh.model.named_parameters()) if world.first else {}
    for name, whole in shards.whole_weights(shards.learning):
        if world.first:
            weights[name].data.copy_(whole)
    return fresh


def _say_health(loop: Loop) -> None:
    loop.logps.write()
    sentences = [finding.sentence for finding in health.findings(loop.metrics.rows(), loop.config.train, loop.steps)]
    durable.write_json(loop.directories.health, {"words": sentences})


def _finish(
    loop: Loop,
    steps: int,
    policy: Policy,
    base: Path,
    results: dict[str, float | None],
    differences: dict[str, float],
) -> None:
    """Write down what the training came to."""
    config, run, metrics, say = loop.config, loop.directories, loop.metrics, loop.listener.say
    policy_digest = identify_model(base, trusts_code=config.policy.trust_remote_code).digest
    facts = {
        "training": loop.training,
        "policy": policy_digest,
        "steps": steps,
        f"{objective_of(config.train).unit}s": len(loop.pairs),
        "results": results,
    }
    record(run, config, "train", **facts, export_check=differences)
    for name, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")):
        before, after = metrics.first(f"eval_{name}"), metrics.last(f"eval_{name}")
        if before is not None and after is not None:
            say(f"held-out  {label} {before:.4f} -> {after:.4f}")
    if (moved := metrics.last("kl/behaviour")) is not None:
        say(f"moved     {moved:.4f} nats per token from the model that wrote the samples, before the last step")
    if policy.adapted is not None:
        say(f"adapter   {run.adapter}")
    if run.model.is_dir():
        say(f"model     {run.model}")


def _must_be_single_passes(policy: Policy, pairs: Examples, train: TrainConfig, steps: int) -> None:
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


def _must_fit_positions(base: Path, config: Config, *splits: Examples) -> None:
    limit = position_limit(base)
    longest = max(pairs.longest for pairs in splits)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"the longest sequence has {longest} tokens, policy.model {config.policy.model!r} reads {limit}: set "
            f"data.max_length={limit} or less, run precompute again (nothing is scored twice), or choose another policy"
        )
