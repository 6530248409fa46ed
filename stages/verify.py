"""`refscore verify --run NAME`: are the stored scores true? A sample, scored again by transformers in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline import durable
from pipeline.config import Config
from pipeline.errors import CheckError, ConfigError
from pipeline.gate import TOLERANCES
from pipeline.models import locate_reference
from pipeline.runs import Run, read_saved_config
from pipeline.scoring import Request, numerics_of, start_scorer
from pipeline.training import Pairs, load_pairs
from stages import console


def run(run: Run, rows: int) -> None:
    """Score `rows` random pairs again; verify.json keeps the figures. Raises CheckError outside the tolerance."""
    saved = read_saved_config(run)
    if not saved:
        raise ConfigError(f"run {run.name!r} has no configuration: run 'refscore precompute' with it first")
    config = Config.model_validate(saved)
    pairs = load_pairs(run.pairs, "train")
    sample = sorted(np.random.default_rng(0).choice(len(pairs), min(rows, len(pairs)), replace=False).tolist())
    figures = _compare(config, pairs, sample)
    durable.write_json(run.directory / "verify.json", figures)
    console.table(
        f"stored scores minus transformers float32, {figures['pairs']} pairs, {figures['tokens']} tokens",
        ["figure", "value"],
        [
            [name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)]
            for name, value in figures.items()
        ],
    )
    if not figures["passed"]:
        raise CheckError(
            f"the stored scores differ by {figures['mean_absolute_difference']:.4f} nats a token from what the reference gives "
            f"(allowed {figures['tolerance_mean_absolute']}): they belong to another model, other token ids or a faulty engine"
        )


def _compare(config: Config, pairs: Pairs, sample: list[int]) -> dict[str, Any]:
    oracle = config.reference.model_copy(update={"engine": "transformers", "dtype": "float32"})
    requests = [Request(pairs.trees[row].trunk, branch) for row in sample for branch in pairs.trees[row].branches]
    scorer = start_scorer(oracle, locate_reference(oracle).merged, numerics_of(oracle), max(map(len, requests)))
    again = scorer.score(requests)
    stored = [logps for row in sample for logps in (pairs.ref_chosen_logps[row], pairs.ref_rejected_logps[row])]
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(stored, again, strict=True)]
    every = np.concatenate(differences)
    sums = np.array([difference.sum() for difference in differences])
    margins = sums[0::2] - sums[1::2]
    signed, absolute = TOLERANCES["float32" if numerics_of(config.reference).dtype == "float32" else "bfloat16"]
    mean_signed, mean_absolute = float(every.mean()), float(np.abs(every).mean())
    noise = float(np.sqrt(np.mean(margins**2)))
    return {
        "passed": bool(abs(mean_signed) <= signed and mean_absolute <= absolute),
        "pairs": len(sample),
        "tokens": len(every),
        "mean_signed_difference": mean_signed,
        "mean_absolute_difference": mean_absolute,
        "max_absolute_difference": float(np.abs(every).max()),
        "max_sequence_difference": float(np.abs(sums).max()),
        "correlation_with_length": _correlation(np.abs(sums), np.array([len(one) for one in differences])),
        "margin_noise_nats": noise,
        "margin_noise_reward": config.train.beta * noise,
        "tolerance_mean_signed": signed,
        "tolerance_mean_absolute": absolute,
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else 0.0
