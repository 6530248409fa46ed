"""The gate: before the first step, a policy that starts from the reference's weights must agree with the stored scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import IMPORTED_BY
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.errors import CheckError
from pipeline.models.identity import identify_model, weights_digest
from pipeline.precompute.agreement import TOLERANCES, agreement, agreement_of_sums
from pipeline.progress import Listener
from pipeline.training.inputs.pairs import Pairs
from pipeline.training.inputs.responses import Responses
from pipeline.training.parallel.world import ALONE, World
from pipeline.training.policies import Policy, precision_of

GATE_PAIRS = 8
# what a difference comes from, of scores that were computed here, and of imported ones
_SUSPECTS = {
    False: "the stored scores belong to other token ids, or one of the two forward passes is wrong",
    True: "the imported scores are those of another model, of other token ids, or in another dtype than was said",
}


@torch.no_grad()
def measure_gate(
    forward: Any, pairs: Pairs | Responses, rows: Sequence[int], numerics: str, beta: float
) -> dict[str, object]:
    """Compare the policy's logps before step 1 with the stored reference, on `rows`.

    `numerics` names the coarser of the two arithmetics (a key of TOLERANCES). Differences are policy minus reference; see
    `pipeline.precompute.agreement`.
    """
    scores = [logps.double().cpu().numpy() for row in rows for logps in forward([pairs.trees[row]])[0]]
    by_sum = isinstance(pairs, Pairs) and pairs.ref_sums
    if isinstance(pairs, Pairs) and pairs.ref_sums:
        sums = [float(logp) for row in rows for logp in pairs.ref_sums[row]]
        figures = agreement_of_sums([float(own.sum()) for own in scores], sums, [len(own) for own in scores], beta)
    else:
        stored = [logps for row in rows for logps in pairs.stored_logps(row)]
        figures = agreement(scores, stored, beta, of_pairs=isinstance(pairs, Pairs))
    signed, absolute = TOLERANCES[numerics]
    passed = abs(figures["mean_signed_difference"]) <= signed and figures["mean_absolute_difference"] <= absolute
    return {
        "applies": True,
        "passed": bool(passed),
        "pairs": len(rows),
        "numerics": numerics,
        "compared": "sums" if by_sum else "tokens",
        **figures,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }


def check_gate(
    config: Config,
    run: Run,
    about: dict[str, Any],
    base: Path,
    policy: Policy,
    pairs: Pairs | Responses,
    listener: Listener,
    world: World = ALONE,
) -> None:
    """Write gate.json; raises CheckError if the policy should agree with the stored scores and does not.

    `about`: what pairs.parquet says of itself. `base`: the directory that the policy was loaded from. All processes of `world`
    measure, the first one writes.
    """

    def write(figures: dict[str, object]) -> None:
        if world.first:
            durable.write_json(run.gate, figures)

    reason = None
    if reference_free(config.train):
        reason = "nothing is compared with the reference"
    elif weights_digest(base) != about["weights_digest"]:
        reason = "the policy does not start from the reference's weights"
    if reason:
        write({"applies": False, "reason": reason})
        listener.say(f"gate      does not apply: {reason}")
        return
    if config.train.objective == "reward":
        return  # a reward model compares nothing with the reference, as was said above
    policy.model.eval()
    precise = precision_of(config) == torch.float32 and about.get("dtype") == "float32"
    rows = list(range(min(GATE_PAIRS, len(pairs))))
    numerics = "float32" if precise else "bfloat16"
    figures = measure_gate(policy.forward, pairs, rows, numerics, config.train.beta)
    text = (
        f"policy against stored reference on {figures['tokens']} tokens: mean difference "
        f"{figures['mean_signed_difference']:+.5f}, mean absolute {figures['mean_absolute_difference']:.5f} nats per token; "
        f"margin noise {figures['margin_noise_nats']:.3f} nats = {figures['margin_noise_reward']:.4f} reward"
    )
    if figures["compared"] == "sums":
        text += " (of the mean of each response, as sums are all that was imported)"
    if config.policy.load_in_4bit:
        reason = "the policy's base has 4 bits, the reference has not"
    elif about.get("model") != identify_model(base, trusts_code=config.policy.trust_remote_code).digest:
        reason = "the policy has the reference's weights, but not its configuration or its code"
    if reason:
        write({**figures, "applies": False, "reason": reason})
        listener.say(f"gate      does not apply ({reason}): {text}")
        return
    write(figures)
    if not figures["passed"]:
        raise CheckError(
            f"the gate is closed: {text}; allowed are {figures['tolerance_mean_signed']} and "
            f"{figures['tolerance_mean_absolute']}. The policy starts from the reference's weights, so both must agree: "
            f"{_SUSPECTS[IMPORTED_BY in about]}. "
            "'refscore verify' re-scores a sample; figures are in " + str(run.gate)
        )
    listener.say(f"gate      passed: {text}")
