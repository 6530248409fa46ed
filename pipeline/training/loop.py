"""The steps of a training, and what is written while they run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_json
from pipeline.config.experiment import Config
from pipeline.hardware import peak_memory_gib, return_freed_memory
from pipeline.progress import Listener
from pipeline.training.checks import health
from pipeline.training.inputs.open import state_of
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.lean import StepInBackward, offloaded_activations
from pipeline.training.optimizers import numbers, update
from pipeline.training.parallel.sharded import Shards
from pipeline.training.parallel.world import Followed, World
from pipeline.training.policies import Policy
from pipeline.training.records.metrics import Metrics
from pipeline.training.records.policy_logps import PolicyLogps
from pipeline.training.saver import Saver
from pipeline.training.schedule import SAVE_STEPS, checkpoint_is_due, is_due, learning_rate, pairs_of_step
from pipeline.training.step import NotFinite, accumulate, evaluate, must_be_finite

# taking memory from the system again costs the step that follows a sixth of its time
_STEPS_TO_RETURN_MEMORY = 8


@dataclass(frozen=True)
class Loop:
    """The steps of one training, and all that is written while they run."""

    config: Config
    directories: Run
    training: str
    policy: Policy
    optimizer: torch.optim.Optimizer
    in_backward: StepInBackward | None
    pairs: Any
    held_out: Pairs
    metrics: Metrics
    logps: PolicyLogps
    steps: int
    listener: Listener
    shards: Shards | None
    world: World

    def run(self, first: int) -> int:
        """Take the steps from `first` (0-based) on; returns how many were taken in all, fewer if the objective ends it."""
        train = self.config.train
        if first and self.world.once(lambda: read_json(self.directories.training).get("ended")) == first:
            return first
        saver = Saver(self.directories.checkpoints, self.training, train, self.world)
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
                try:
                    values = self._step(done, rows, rate)
                except (NotFinite, Followed):
                    # all processes are here: what was begun is written
                    with suppress(Exception):
                        saver.wait()
                    raise
                if done % _STEPS_TO_RETURN_MEMORY == 0:
                    return_freed_memory()
                pending.append(values)
                tokens += sum(len(self.pairs.trees[row]) for row in rows)
                why = self._why_ended(values)
                last = done == self.steps or why is not None
                if last or done % train.logging_steps == 0:
                    values = _averaged(pending)
                    seconds = time.monotonic() - since
                    values["learning_rate"] = rate
                    values["step_seconds"] = seconds / len(pending)
                    values["tokens_per_second"] = tokens / seconds
                    values["peak_memory_gib"] = peak_memory_gib()
                    self.metrics.add(done, values)
                    pending, tokens, since = [], 0, time.monotonic()
                ticker.advance(1, _line(values))
                if last or is_due(done, train.eval_steps):
                    self._evaluate(done)
                    self._say_findings(kinds_said)
                    since = time.monotonic()
                idle = time.monotonic() - saved
                if last or self._is_due(done, idle, writing):
                    started = time.monotonic()
                    self.metrics.flush()
                    if self.world.first:
                        self.logps.write()
                    if self.world.first and why is not None:
                        path = self.directories.training
                        durable.write_json(path, {**read_json(path), "ended": done})
                    state = self.logps.state() | state_of(self.pairs)
                    saver.save(done, self.policy, self.shards, self.optimizer, state, last=last)
                    since = saved = time.monotonic()
                    writing = since - started
                if why is not None:
                    self.listener.say(f"ended     after step {done} of {self.steps}: {why}")
                    return done
        return self.steps

    def _why_ended(self, values: Mapping[str, float]) -> str | None:
        """Why the training is to end after a step with these means; None if it goes on."""
        bound, moved = self.config.train.policy_gradient.max_kl, values.get("kl/behaviour", math.nan)
        if bound is None or not moved > bound:
            return None
        return (
            f"the policy is {moved:.4f} nats per token from the model that wrote the samples, train.policy_gradient.max_kl is "
            f"{bound:g}, so that they say little of it: sample it anew ('refscore iterate' takes rounds), or raise the bound"
        )

    def _is_due(self, done: int, idle: float, writing: float) -> bool:
        every = self.config.train.save_steps
        if every is not None or not is_due(done, SAVE_STEPS):
            return checkpoint_is_due(done, every, idle, writing)
        # by the clock of the first process
        due: bool = self.world.once(lambda: checkpoint_is_due(done, every, idle, writing))
        return due

    def _step(self, number: int, rows: list[int], rate: float) -> dict[str, float]:
        """Take step `number` (1-based) on `rows` at the learning rate `rate`; means and the gradient's norm."""
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
            self.listener.say(f"step {number}: the {stop.unit}s are kept in {path}; metrics up to here in {metrics}")
            raise
        return values

    def _evaluate(self, step: int) -> None:
        if not len(self.held_out):
            return
        self.policy.model.eval()
        values = evaluate(self.policy.forward, self.held_out, self.config.train, self.logps.note, self.world)
        self.logps.keep_evaluation(step)
        self.policy.model.train()
        # held-out responses of one label have no margin
        values = {name: value for name, value in values.items() if name == "loss" or math.isfinite(value)}
        self.metrics.add(step, values, prefix="eval_")
        shown = {
            "loss": "held-out loss {:.4f}",
            "rewards/margins": "margin {:.3f}",
            "rewards/accuracies": "accuracy {:.3f}",
        }
        said = [form.format(values[name]) for name, form in shown.items() if name in values]
        self.listener.say(f"step {step}: {', '.join(said)}")

    def _say_findings(self, kinds_said: set[str]) -> None:
        """Say what looks wrong, each kind once."""
        for finding in health.findings(self.metrics.rows(), self.config.train, self.steps):
            if finding.kind not in kinds_said:
                kinds_said.add(finding.kind)
                self.listener.say(f"health    {finding.sentence}")


def _averaged(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's mean over the steps in which there was something to measure; the highest of what is highest."""
    found: dict[str, float] = {}
    for name in steps[0]:
        values = [values[name] for values in steps if not math.isnan(values[name])]
        if values:
            found[name] = max(values) if name.endswith("/max") else sum(values) / len(values)
    return found


def _line(values: Mapping[str, float]) -> str:
    if "rewards/accuracies" in values:
        # a step of responses of one label has no margin
        margin = f"margin {values['rewards/margins']:.3f}  " if "rewards/margins" in values else ""
        figures = f"{margin}accuracy {values['rewards/accuracies']:.2f}"
    elif "value/mean" in values:
        explained = values.get("value/explained_variance", math.nan)
        figures = f"value {values['value/mean']:.3f}  explained {explained:.2f}"
    elif "ratio/max" in values and math.isnan(values.get("kl/behaviour", math.nan)):
        figures = "nothing to learn from: all samples were cut off"
    else:
        clipped = f"  clipped {values['clip_ratio/region_mean']:.3f}" if "clip_ratio/region_mean" in values else ""
        figures = f"ratio up to {values['ratio/max']:.2f}  moved {values['kl/behaviour']:.4f}{clipped}"
    text = f"loss {values['loss']:.4f}  {figures}"
    if "tokens_per_second" in values:
        text += f"  {values['tokens_per_second']:.0f} tokens/s  {values['peak_memory_gib']:.1f} GiB"
    return text
