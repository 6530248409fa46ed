"""Is what was exported what was trained? The directory is loaded again and must give the trained model's outputs on a few pairs.

Outputs are log-probabilities of response tokens, or rewards of responses for a reward model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.errors import CheckError
from pipeline.forward.trees import Tree
from pipeline.precompute.agreement import TOLERANCES
from pipeline.training.objectives.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# trees that are compared: a wrong head, a missing adapter or weights of another step show in the first
CHECKED = 4


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel,
    trees: Sequence[Tree],
    objective: Objective,
    call: Callable[[Any, Sequence[Tree]], Any] | None = None,
    precision: torch.dtype | None = None,
) -> np.ndarray:
    """What the objective reads of `trees`, log-probabilities of all tokens or rewards of all responses: float64, in order.
    `call` runs the model's pass, if its weights are not whole.

    In float32 arithmetic unless the weights have fewer digits, or in `precision`. Runs in evaluation mode, and leaves the model in
    the mode it was in and with the attention it had.
    """
    training, attention = model.training, model.config.get_text_config()._attn_implementation  # noqa: SLF001  # no public name
    model.eval()
    if precision is None:
        precision = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
    run = objective.forward_of(model, "separate", precision, whole=call is None)
    parts = [
        output.reshape(-1)
        for tree in trees
        for outputs in (call(run, [tree]) if call else run([tree]))
        for output in outputs
    ]
    model.set_attn_implementation(attention)
    model.train(training)
    outputs: np.ndarray = torch.cat(parts).double().cpu().numpy()
    return outputs


def must_agree(again: np.ndarray, place: Path, trained: np.ndarray, pairs: int, *, coarse: bool) -> float:
    """Mean absolute difference between outputs `again` of what was exported to `place`, and those when it was trained, on so many
    `pairs`.

    `coarse`: some of the weights have, or had, 16 bits or fewer. Raises CheckError if the difference is more than arithmetic
    makes.
    """
    difference = float(np.abs(again - trained).mean()) if len(again) == len(trained) else float("nan")
    allowed = TOLERANCES["bfloat16" if coarse else "float32"][1]
    if not difference <= allowed:
        raise CheckError(
            f"what was exported is not what was trained: loaded again, its outputs on {pairs} pairs differ by "
            f"{difference:.4f} on average, allowed is {allowed}. {place} keeps what it held; the checkpoints hold the trained "
            "weights"
        )
    return difference
