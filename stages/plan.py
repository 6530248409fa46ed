"""`refscore plan`: what will it take? Memory, steps, tokens and time, before any of them is spent."""

from __future__ import annotations

from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.planning.outlook import Outlook, on_a_gpu, outlook, smaller
from pipeline.precompute.plan import make_plan
from pipeline.progress import duration
from stages import console

_HEAD = ["GiB on one device", "weights", "gradients", "optimizer", "activations", "temporary", "libraries", "together"]


def main(
    config: Config, devices: int, gpu_memory: float | None, scoring_speed: float | None, speed: float | None
) -> None:
    """Print what the experiment takes; `gpu_memory` GiB asks for a GPU and says what to set if it is too small.

    `devices` share the scoring; `scoring_speed` and `speed` are tokens per second and device of stages one and two.
    """
    if gpu_memory is not None:
        config = on_a_gpu(config)
    plan = make_plan(config)
    for line in plan.lines():
        console.say(line)
    console.say("simulating a step ...")
    seen = outlook(config, plan, "cuda" if gpu_memory is not None else None)
    _show_training(seen, speed)
    if seen.scoring is not None:
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(seen.scoring).items())
        tokens = seen.scoring_tokens // devices
        console.say(
            f"scoring   {seen.scoring_gib:.2f} GiB on each device ({listed}), {tokens:,} tokens on each of {devices}"
            + _time(tokens, scoring_speed)
            + _price(config.reference, devices, tokens, scoring_speed)
        )
    if gpu_memory is not None and seen.training is not None:
        _show_fit(config, seen, gpu_memory)


def _show_training(seen: Outlook, speed: float | None) -> None:
    held = seen.training
    if held is None:
        console.say(f"training  {seen.unpredicted}")
    else:
        sizes = [held.weights, held.gradients, held.optimizer, held.activations, held.temporary]
        beside = seen.training_gib - held.total / 2**30
        row = [*(f"{size / 2**30:.2f}" for size in sizes), f"{beside:.2f}", f"{seen.training_gib:.2f}"]
        console.table(f"Training on {seen.kind}, simulated", _HEAD, [["one step", *row]])
    console.say(
        f"training  {seen.steps} steps, about {seen.training_tokens:,} tokens, {seen.tokens_per_pass:,} in a forward pass "
        f"(longest pair {seen.longest:,})" + _time(seen.training_tokens, speed)
    )


def _show_fit(config: Config, seen: Outlook, gpu_memory: float) -> None:
    needed = seen.training_gib
    fits = needed <= gpu_memory
    console.say(f"{'fits' if fits else 'too large':9} training takes {needed:.1f} of {gpu_memory:g} GiB")
    if fits:
        return
    for settings, needed in smaller(config, seen, gpu_memory):
        console.say(f"          {needed:.1f} GiB with {settings}")
    if needed > gpu_memory:
        console.say(
            "          less still: policy.lora={r: 16}, fewer train.tokens_per_batch, a shorter data.max_length"
        )


def _time(tokens: float, speed: float | None) -> str:
    return f", {duration(tokens / speed)} at {speed:g} tokens/s" if speed else ""


def _price(reference: ReferenceConfig, devices: int, tokens: float, speed: float | None) -> str:
    if not speed or not reference.price_per_hour:
        return ""
    return f", {devices * tokens / speed / 3600 * reference.price_per_hour:.2f} at {reference.price_per_hour:g} per hour and device"
