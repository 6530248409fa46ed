"""The gate of samples: before the first step a policy that wrote them must find every token as likely as is stored of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.config.training import TrainConfig
from pipeline.errors import CheckError
from pipeline.models.identity import identify_model, weights_digest
from pipeline.precompute.agreement import TOLERANCES
from pipeline.progress import Listener
from pipeline.training.inputs.batches import micro_batches
from pipeline.training.inputs.rollouts import Rollouts
from pipeline.training.parallel.world import ALONE, World
from pipeline.training.policies import Policy, precision_of

_PROMPTS = 8


@torch.no_grad()
def measure_ratios(
    forward: Any, rollouts: Rollouts, prompts: int, numerics: str, train: TrainConfig
) -> dict[str, object]:
    """Compare the policy's logps of the first prompts' samples with those stored of the model that wrote them, in forward passes
    as long as those of training.

    `numerics` names the coarser of the two arithmetics (a key of TOLERANCES). Differences are policy minus stored, nats per token;
    `kl` is the k3 estimate of what lies between the two models, per token.
    """
    examples = rollouts.one_by_one
    differences = []
    for group in micro_batches(forward, examples, range(int(rollouts.starts[prompts])), train):
        found = [branches[0] for branches in forward([examples.trees[number] for number in group])]
        stored = [examples.logps(number, "logps") for number in group]
        differences += [
            own.double().cpu().numpy() - theirs.astype(np.float64) for own, theirs in zip(found, stored, strict=True)
        ]
    every = np.concatenate(differences)
    signed, absolute = TOLERANCES[numerics]
    mean, distance = float(every.mean()), float(np.abs(every).mean())
    return {
        "applies": True,
        "passed": bool(abs(mean) <= signed and distance <= absolute),
        "samples": len(differences),
        "tokens": len(every),
        "numerics": numerics,
        "mean_signed_difference": mean,
        "mean_absolute_difference": distance,
        "max_absolute_difference": float(np.abs(every).max()),
        "ratio_mean": float(np.exp(np.clip(every, -50, 50)).mean()),
        "ratio_max": float(np.exp(min(every.max(), 50.0))),
        "kl": float((np.expm1(np.clip(every, -50, 50)) - every).mean()),
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }


def check_ratios(
    config: Config,
    run: Run,
    about: dict[str, Any],
    base: Path,
    policy: Policy,
    rollouts: Rollouts,
    listener: Listener,
    world: World = ALONE,
) -> None:
    """Write gate.json; raises CheckError if the policy wrote the samples and does not agree with their stored scores, or if another
    model wrote them that is too far from it to learn from.

    `about`: what rollouts.parquet says of itself. `base`: the directory that the policy was loaded from. All processes of `world`
    measure, the first one writes.
    """
    policy.model.eval()
    precise = precision_of(config) == torch.float32 and about.get("dtype") == "float32"
    figures = measure_ratios(
        policy.forward, rollouts, min(_PROMPTS, len(rollouts)), "float32" if precise else "bfloat16", config.train
    )
    reason = None
    if weights_digest(base) != about["policy"]["weights_digest"]:
        reason = "another model wrote the samples"
    elif config.policy.load_in_4bit:
        reason = "the policy's base has 4 bits, the model that wrote the samples has not"
    elif about["policy"]["model"] != identify_model(base, trusts_code=config.policy.trust_remote_code).digest:
        reason = "the policy has the weights of the model that wrote the samples, but not its configuration or its code"
    if world.first:
        durable.write_json(run.gate, figures if reason is None else {**figures, "applies": False, "reason": reason})
    text = (
        f"policy against the stored model that wrote the samples on {figures['tokens']} tokens: mean ratio "
        f"{figures['ratio_mean']:.5f}, mean difference {figures['mean_signed_difference']:+.5f}, mean absolute "
        f"{figures['mean_absolute_difference']:.5f} nats per token"
    )
    bound = config.train.policy_gradient.max_kl or math.inf
    if reason is not None:
        listener.say(f"gate      does not apply ({reason}): {text}")
        if not float(str(figures["kl"])) <= bound:
            raise CheckError(
                f"{reason}, and it is {figures['kl']:.3f} nats per token from the policy, train.policy_gradient.max_kl is "
                f"{bound:g}: so far from it they teach little. Sample the policy itself ('refscore rollout'), or raise the "
                "bound if you mean it"
            )
        return
    if not figures["passed"]:
        raise CheckError(
            f"the gate is closed: {text}; allowed are {figures['tolerance_mean_signed']} and "
            f"{figures['tolerance_mean_absolute']}. The policy has the weights that wrote the samples, so every ratio must be 1: "
            f"the stored scores belong to other token ids, or one of the two forward passes is wrong. Figures are in {run.gate}"
        )
    listener.say(f"gate      passed: {text}")
