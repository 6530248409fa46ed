"""`refscore plan`: what will it take? Memory, disk, steps, tokens and time, before any of them is spent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config.experiment import Config, ReferenceConfig, without_reference
from pipeline.errors import ConfigError
from pipeline.hardware import device_kind
from pipeline.pairs.kinds import UNITS
from pipeline.planning.cautions import cautions
from pipeline.planning.forecast import Disk, Speeds, disk, length_that_fits, memory_here, speeds
from pipeline.planning.outlook import DEVICES, Outlook, devices_that_fit, on_a_gpu, outlook, smaller
from pipeline.planning.sampled import Sampled, foresee
from pipeline.precompute.plan import Plan, make_plan
from pipeline.progress import duration
from stages import console

_HEAD = ["GiB", "weights", "gradients", "optimizer", "activations", "gathered", "temporary", "libraries", "together"]


def main(
    config: Config, devices: int, gpu_memory: float | None, scoring_speed: float | None, speed: float | None
) -> None:
    """Print what the experiment takes, and what to set if it is too much.

    `gpu_memory` GiB asks for a GPU instead of this machine. `devices` share the scoring, and train together; `scoring_speed` and
    `speed` are tokens per second and device of stages one and two, None: forecast for this machine.
    """
    if gpu_memory is not None:
        config = on_a_gpu(config)
    on_samples = config.train.on_samples
    plan = make_plan(without_reference(config) if on_samples else config)
    said = cautions(config, plan)
    for line in [*plan.lines(scored=not on_samples), *(f"warning   {caution}" for caution in said)]:
        console.say(line)
    sampled = foresee(config) if on_samples else None
    if sampled:
        _show_samples(config, sampled)
    console.say("simulating a step ...")
    kind = "cuda" if gpu_memory is not None else device_kind()
    seen = outlook(config, plan, kind, devices, sampled)
    here = speeds(config, plan) if kind == device_kind() and None in (scoring_speed, speed) else None
    if sampled and sampled.missing:
        _show_rollout(seen, sampled.missing * sampled.max_tokens, here)
    _show_training(seen, "sample" if sampled else UNITS[plan.data][:-1], speed, here)
    if seen.scoring is not None:
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(seen.scoring).items())
        tokens = seen.scoring_tokens // devices
        console.say(
            f"scoring   {seen.scoring_gib:.2f} GiB on each device ({listed}), {tokens:,} tokens on each of {devices}"
            + _time(tokens, scoring_speed, here.scoring if here else None)
            + _price(config.reference, devices, tokens, scoring_speed)
        )
    _show_sampling(config, plan)
    if here is None and None in (scoring_speed, speed):
        console.say("time      not forecast for a GPU that is not here: give --scoring-speed and --training-speed")
    elif here is not None:
        console.say(
            f"time      by products of matrices, {here.products / 1e9:.0f} GFLOP/s here now; half or twice is as likely"
        )
    on_disk = disk(config, plan, seen, sampled)
    _show_disk(on_disk)
    # processes on processors share one memory
    memory = gpu_memory or memory_here() / (devices if kind == "cpu" else 1)
    fitting = _show_fit(config, plan, seen, memory) if seen.training is not None else {}
    rates = (scoring_speed or (here.scoring if here else None), speed or (here.training if here else None))
    console.answer(
        {
            **_of_data(plan, sampled),
            "warnings": said,
            "training": {**_of_training(seen, memory), **fitting, "tokens_per_second": rates[1]},
            "scoring": {
                "tokens": seen.scoring_tokens,
                "devices": devices,
                "gib": seen.scoring_gib if seen.scoring else None,
                "tokens_per_second": rates[0],
            },
            "disk_bytes": {**asdict(on_disk), "total": on_disk.total},
        }
    )


def _of_data(plan: Plan, sampled: Sampled | None) -> dict[str, Any]:
    pairs, sequences, misses = plan.pairs, plan.sequences, len(plan.missing)
    adopted = {reference: len(held) for reference, held in plan.adopted.items()}
    if sampled:
        sequences, misses, adopted = sampled.models * sampled.samples, sampled.to_score, sampled.adopted
    return {
        "reference_id": plan.identity.reference_id,
        "data": pairs.formats,
        "rows": pairs.read,
        UNITS[plan.data].replace(" ", "_"): pairs.splits,
        **({"labels": pairs.labels} if pairs.labels else {}),
        "dropped": {reason: drop.count for reason, drop in pairs.drops.items()},
        "sequences": sequences,
        "hits": sequences - misses - sum(adopted.values()),
        **({"adopted": adopted} if adopted else {}),
        "misses": misses,
        **({"samples": sampled.samples, "samples_made": sampled.made} if sampled else {}),
    }


def _of_training(seen: Outlook, memory: float) -> dict[str, Any]:
    known = seen.training is not None
    return {
        "device": seen.kind,
        "devices": seen.devices,
        "steps": seen.steps,
        "tokens": seen.training_tokens,
        "longest_pair": seen.longest,
        "gib": seen.training_gib if known else None,
        "of_gib": memory,
        "fits": seen.training_gib <= memory if known else None,
        "bytes": asdict(seen.training) if seen.training else None,
        "not_predicted": seen.unpredicted or None,
    }


def _show_training(seen: Outlook, unit: str, speed: float | None, here: Speeds | None) -> None:
    held = seen.training
    if held is None:
        console.say(f"training  {seen.unpredicted}")
    else:
        beside = seen.training_gib - held.total / 2**30
        # as _HEAD names them
        sizes = {name: f"{size / 2**30:.2f}" for name, size in vars(held).items()}
        sizes |= {"libraries": f"{beside:.2f}", "together": f"{seen.training_gib:.2f}"}
        where = f"each of {seen.devices} devices ({seen.kind})" if seen.devices > 1 else seen.kind
        shown = [name for name in _HEAD[1:] if seen.devices > 1 or name != "gathered"]
        console.table(
            f"Training on {where}, simulated",
            ["GiB on one device", *shown],
            [["one step", *(sizes[name] for name in shown)]],
        )
    each = seen.training_tokens // seen.devices
    among = f"{each:,} on each of {seen.devices}, " if seen.devices > 1 else ""
    console.say(
        f"training  {seen.steps} steps, about {seen.training_tokens:,} tokens, {among}{seen.tokens_per_pass:,} in a forward pass "
        f"(longest {unit} {seen.longest:,})" + _time(each, speed, here.training if here else None)
    )


def _show_samples(config: Config, sampled: Sampled) -> None:
    too_long = f", {sampled.too_long} more leave no room for them" if sampled.too_long else ""
    there = f"{sampled.made} made before under the same settings, " if sampled.made else ""
    console.say(
        f"samples   {len(sampled.prompts)} prompts x {sampled.each} of up to {sampled.max_tokens} tokens{too_long}: {there}"
        f"{sampled.missing} to make by {config.policy.model}"
    )
    whose = "the policy, which is the reference" if sampled.models == 1 else "the policy and the reference"
    console.say(
        f"scores    under {whose}: {sampled.to_score} of {sampled.models * sampled.samples} sequences to score, "
        + "".join(f"{count} adopted from {by[:12]}, " for by, count in sampled.adopted.items())
        + f"up to {sampled.tokens_to_score:,} tokens"
    )


def _show_rollout(seen: Outlook, tokens: int, here: Speeds | None) -> None:
    """What making the samples takes."""
    least = "at least " if seen.kind == "cuda" else ""
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(seen.sampling).items())
    console.say(
        f"sampling  {least}{seen.sampling_gib:.2f} GiB on one device ({listed}), up to {tokens:,} tokens"
        + _time(tokens, None, here.sampling if here else None)
    )


def _show_sampling(config: Config, plan: Plan) -> None:
    generate, held_out = config.generate, plan.pairs.splits.get("eval", 0)
    prompts = min(held_out, generate.max_prompts or held_out)
    if prompts:
        models, each = 2 + len(generate.models), generate.samples + generate.kl_samples
        responses = f"{each} responses of up to {generate.max_tokens} tokens"
        console.say(f"sampling  at most {prompts} held-out prompts x {models} models x {responses}")


def _show_disk(needed: Disk) -> None:
    parts = {"checkpoints": needed.checkpoints, "model": needed.model, "pairs": needed.pairs, "store": needed.store}
    parts |= {"samples": needed.samples} if needed.samples else {}
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    console.say(f"disk      {needed.total / 2**30:.2f} GiB ({listed}), {needed.free / 2**30:.1f} GiB are free")
    if needed.total > needed.free:
        console.say("warning   too little disk is free: work where there is more, or set policy.lora={r: 16}")


def _show_fit(config: Config, plan: Plan, seen: Outlook, memory: float) -> dict[str, Any]:
    """Say whether it fits, and else what would; returns, for JSON, on how many devices and with which length it would."""
    needed = seen.training_gib
    fits = needed <= memory
    on_each = f" on each of {seen.devices} devices" if seen.devices > 1 else ""
    console.say(f"{'fits' if fits else 'too large':9} training takes {needed:.1f} of {memory:.4g} GiB{on_each}")
    if fits:
        return {}
    for settings, needed in smaller(config, seen, memory):
        console.say(f"          {needed:.1f} GiB with {settings}")
    if needed > memory:
        shorter = "generate.max_tokens" if config.train.on_samples else "data.max_length"
        console.say(f"          less still: policy.lora={{r: 16}}, fewer train.tokens_per_batch, a shorter {shorter}")
    length = None if config.train.on_samples else length_that_fits(config, plan, seen, memory)
    if length:
        one = f"one long {UNITS[plan.data][:-1]}"
        console.say(f"          or with data.max_length={length}: {one} takes the memory, {seen.longest:,} tokens")
    return {"fits_on_devices": _show_devices(config, seen, memory), "fits_with_max_length": length}


def _show_devices(config: Config, seen: Outlook, memory: float) -> int | None:
    """Say on how many devices it fits as it is; returns how many."""
    # processors of one machine share its memory: more of them do not hold more
    if seen.kind == "cpu" or seen.devices >= DEVICES[-1]:
        return None
    try:
        found = devices_that_fit(config, seen, memory)
    except ConfigError as refused:
        console.say(f"          on more devices, as it is, not at all: {refused}")
        return None
    if found is None:
        console.say(f"          on more devices, as it is, not at all: it is too large for each of {DEVICES[-1]}")
        return None
    console.say(f"          or as it is on {found[0]} devices (--devices {found[0]}): {found[1]:.1f} GiB on each")
    return found[0]


def _time(tokens: float, speed: float | None, here: float | None) -> str:
    if speed:
        return f", {duration(tokens / speed)} at {speed:g} tokens/s"
    return f", about {duration(tokens / here)} at {here:.2g} tokens/s" if here else ""


def _price(reference: ReferenceConfig, devices: int, tokens: float, speed: float | None) -> str:
    if not speed or not reference.price_per_hour:
        return ""
    return f", {devices * tokens / speed / 3600 * reference.price_per_hour:.2f} at {reference.price_per_hour:g} per hour and device"
