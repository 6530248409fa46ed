"""Stage two without its command line: loading pairs and policy, one step, evaluation, the gate.

Training reads pairs.parquet and the policy; it never opens the reference model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.config import TrainConfig
from pipeline.errors import CheckError, DataError
from pipeline.forward import Forward, Tree
from pipeline.losses import dpo_loss
from pipeline.schema import PAIRS, TRAIN_METRICS, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split, ready for the forward pass; `ref_*_logps` hold per-token values, `ref_*` their sums."""

    pair_ids: list[str]
    trees: list[Tree]
    ref_chosen_logps: list[np.ndarray]
    ref_rejected_logps: list[np.ndarray]
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.pair_ids)


def load_pairs(path: Path, split: str) -> Pairs:
    """Read one split of pairs.parquet. Raises DataError where a row's scores do not fit its tokens or its sums."""
    columns = [
        name for name in PAIRS.names if name.endswith(("_ids", "_logps", "_logp")) or name in ("pair_id", "split")
    ]
    table = read_table(path, PAIRS, columns)
    table = table.filter(pc.equal(table["split"], split))
    ids = {side: _lists(table, f"{side}_ids") for side in ("prompt", "chosen", "rejected")}
    logps = {side: _lists(table, f"ref_{side}_logps") for side in ("chosen", "rejected")}
    sums = {side: table[f"ref_{side}_logp"].to_numpy() for side in ("chosen", "rejected")}
    pair_ids = table["pair_id"].to_pylist()
    for side in ("chosen", "rejected"):
        for row, pair_id in enumerate(pair_ids):
            values = logps[side][row]
            if len(values) != len(ids[side][row]) or not np.isfinite(values).all():
                raise DataError(f"{path}: pair {pair_id} has no whole set of scores for {side}: run precompute again")
            if abs(float(values.sum(dtype=np.float64)) - sums[side][row]) > 1e-6 * (1 + abs(sums[side][row])):
                raise DataError(f"{path}: pair {pair_id}: ref_{side}_logp is not the sum of ref_{side}_logps")
    trees = [
        Tree(prompt.tolist(), (chosen.tolist(), rejected.tolist()))
        for prompt, chosen, rejected in zip(ids["prompt"], ids["chosen"], ids["rejected"], strict=True)
    ]
    return Pairs(pair_ids, trees, logps["chosen"], logps["rejected"], sums["chosen"], sums["rejected"])


def make_optimizer(model: PreTrainedModel, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms and biases are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=train.learning_rate, fused=True)


def without_dropout(model: PreTrainedModel) -> None:
    """Turn dropout off for good: the stored reference was scored without it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def batch_logps(forward: Forward, pairs: Pairs, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of policy logps of chosen and rejected, float64 [B]; float32 sums would lose digits on long responses."""
    found = forward([pairs.trees[row] for row in rows])
    chosen = torch.stack([logps[0].double().sum() for logps in found])
    rejected = torch.stack([logps[1].double().sum() for logps in found])
    return chosen, rejected


def batch_loss(
    forward: Forward, pairs: Pairs, rows: Sequence[int], train: TrainConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """Sum of the pairs' losses, and sums of TRAIN_METRICS over the pairs."""
    chosen, rejected = batch_logps(forward, pairs, rows)
    ref_chosen, ref_rejected = (
        torch.from_numpy(values[list(rows)]).to(chosen.device) for values in (pairs.ref_chosen, pairs.ref_rejected)
    )
    terms = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=train.beta, label_smoothing=train.label_smoothing)
    margins = terms.chosen_rewards - terms.rejected_rewards
    values = (
        terms.losses,
        terms.chosen_rewards,
        terms.rejected_rewards,
        margins,
        (margins > 0).float(),
        chosen,
        rejected,
    )
    return terms.losses.sum(), {
        name: float(value.detach().sum()) for name, value in zip(TRAIN_METRICS, values, strict=True)
    }


def train_step(forward: Forward, pairs: Pairs, rows: Sequence[int], train: TrainConfig) -> dict[str, float]:
    """Accumulate the gradient of the mean loss over `rows`; returns means of TRAIN_METRICS.

    The mean is over the pairs of the whole step, so splitting a step into more micro-batches changes nothing.
    Raises CheckError, with the pairs, where the loss is not finite.
    """
    sums = dict.fromkeys(TRAIN_METRICS, 0.0)
    for micro in micro_batches(pairs, rows, train.per_device_train_batch_size):
        loss, found = batch_loss(forward, pairs, micro, train)
        if not math.isfinite(found["loss"]):
            ids = ", ".join(pairs.pair_ids[row] for row in micro)
            raise CheckError(
                f"the loss is {found['loss']}: training stops. Lower train.learning_rate; the pairs are {ids}"
            )
        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        sums = {name: sums[name] + found[name] for name in TRAIN_METRICS}
    return {name: value / len(rows) for name, value in sums.items()}


@torch.no_grad()
def evaluate(forward: Forward, pairs: Pairs, train: TrainConfig) -> dict[str, float]:
    """Means of TRAIN_METRICS over all `pairs`."""
    sums = dict.fromkeys(TRAIN_METRICS, 0.0)
    for micro in micro_batches(pairs, range(len(pairs)), train.per_device_eval_batch_size):
        found = batch_loss(forward, pairs, micro, train)[1]
        sums = {name: sums[name] + found[name] for name in TRAIN_METRICS}
    return {name: value / len(pairs) for name, value in sums.items()}


def micro_batches(pairs: Pairs, rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """Rows in groups of `size`, similar lengths together, so that little is padded."""
    ordered = sorted(rows, key=lambda row: (len(pairs.trees[row]), row))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


# --- the gate

GATE_PAIRS = 8
# per token, in nats: what float32 and bfloat16 arithmetic may differ by, measured with room to spare. Another model, a
# broken template or a mask off by one differ by several tenths and more.
TOLERANCES = {"float32": (0.001, 0.002), "bfloat16": (0.02, 0.1)}


@torch.no_grad()
def measure_gate(forward: Forward, pairs: Pairs, rows: Sequence[int], numerics: str, beta: float) -> dict[str, object]:
    """Compare the policy's logps before step 1 with the stored reference, on `rows`.

    `numerics` names the coarser of the two arithmetics (a key of TOLERANCES). Differences are policy minus reference, in
    nats per token; margin noise is the root mean square over pairs of the difference of the two sums.
    """
    differences, margins = [], []
    for row in rows:
        chosen, rejected = forward([pairs.trees[row]])[0]
        sides = [
            chosen.double().cpu().numpy() - pairs.ref_chosen_logps[row],
            rejected.double().cpu().numpy() - pairs.ref_rejected_logps[row],
        ]
        differences += sides
        margins.append(float(sides[0].sum() - sides[1].sum()))
    every = np.concatenate(differences)
    signed, absolute = TOLERANCES[numerics]
    mean_signed, mean_absolute = float(every.mean()), float(np.abs(every).mean())
    noise = math.sqrt(float(np.mean(np.square(margins))))
    return {
        "applies": True,
        "passed": bool(abs(mean_signed) <= signed and mean_absolute <= absolute),
        "pairs": len(rows),
        "tokens": len(every),
        "numerics": numerics,
        "mean_signed_difference": mean_signed,
        "mean_absolute_difference": mean_absolute,
        "max_absolute_difference": float(np.abs(every).max()),
        "margin_noise_nats": noise,
        "margin_noise_reward": beta * noise,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }


def _lists(table: pa.Table, column: str) -> list[np.ndarray]:
    return [value.values.to_numpy(zero_copy_only=False) for value in table[column]]
