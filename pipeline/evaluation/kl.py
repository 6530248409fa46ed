"""What training cost: how far the policy has moved from the reference, KL(policy || reference) in nats per response.

Measured as in the DPO paper's figure 2 on responses that the policy itself samples at temperature 1 without truncation of
the distribution, each scored under both models by stage one's scorer: the mean over prompts of log pi(y|x) -
log pi_ref(y|x), summed over the response's tokens. Responses are cut at `generate.max_tokens`, so it is the divergence
of what is generated, not of endless responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.tables import KL
from pipeline.config.experiment import GenerateConfig
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference
from pipeline.engines.start import start_scorer
from pipeline.evaluation.rates.statistics import Interval, bootstrap_mean
from pipeline.evaluation.results import Cost
from pipeline.judges.judging import Prompt


def on_policy(settings: GenerateConfig, dtype: str) -> GenerateConfig:
    """The settings under which KL is measured: the policy's own distribution, in the dtype that scores.

    Temperature 1, every token that has a probability, ends included: samples from which ends are left out are not the policy's.
    """
    return settings.model_copy(
        update={"temperature": 1.0, "top_p": 1.0, "fixed_length": False, "samples": settings.kl_samples, "dtype": dtype}
    )


def score_responses(
    reference: OpenedReference, directory: Path, prompts: Sequence[Prompt], table: pa.Table
) -> list[np.ndarray]:
    """Logps of the table's responses, in order, under the model in `directory`, in the reference's numerics."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    requests = [Request(by_id[row["prompt_id"]].ids, row["response_ids"]) for row in table.to_pylist()]
    with start_scorer(reference.config, directory, reference.numerics, max(map(len, requests))) as scorer:
        return list(scorer.score(requests))


def kl_table(samples: pa.Table, logps: Sequence[np.ndarray] | None, ref_logps: Sequence[np.ndarray] | None) -> pa.Table:
    """kl.parquet's content: samples with both models' scores, sums in float64; the reference's own stay without."""
    rows = samples.to_pylist()
    if logps is None or ref_logps is None:
        return pa.Table.from_pylist(rows, schema=KL)
    for row, own, ref in zip(rows, logps, ref_logps, strict=True):
        row |= {"logps": own, "ref_logps": ref}
        row |= {"logp": float(own.sum(dtype=np.float64)), "ref_logp": float(ref.sum(dtype=np.float64))}
    return pa.Table.from_pylist(rows, schema=KL)


def divergence(table: pa.Table) -> Cost:
    """KL's figures for one model's rows of kl.parquet: nats per response, with an interval over prompts; nats per token.

    `low_variance` is another unbiased estimate of the same sum (per token r - 1 - log r with r = pi_ref / pi), never
    negative: far from `kl` it says that there are too few samples.
    """
    sums, others = defaultdict(list), defaultdict(list)
    tokens = 0
    for row in table.to_pylist():
        gaps = np.asarray(row["logps"], dtype=np.float64) - np.asarray(row["ref_logps"], dtype=np.float64)
        sums[row["prompt_id"]].append(float(gaps.sum()))
        others[row["prompt_id"]].append(float((np.expm1(-gaps) + gaps).sum()))
        tokens += len(gaps)
    return Cost(
        kl=bootstrap_mean([float(np.mean(values)) for values in sums.values()]),
        low_variance=bootstrap_mean([float(np.mean(values)) for values in others.values()]),
        per_token=sum(map(sum, sums.values())) / max(1, tokens),
        responses=len(table),
        tokens=tokens,
    )


def cost_figures(kl: pa.Table | None, rewards: dict[str, list[float | None]]) -> dict[str, Cost]:
    """What training cost each model and what it got for it, both on responses at temperature 1.

    `kl`: kl.parquet, the reference's responses too; `rewards`: judge -> rewards of its rows.
    """
    if kl is None:
        return {}
    rows = kl.select(["model", "prompt_id"]).to_pylist()
    costs: dict[str, Cost] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        reward: dict[str, Interval] = {}
        for judge, values in rewards.items():
            by_prompt: dict[str, list[float]] = defaultdict(list)
            for row, value in zip(rows, values, strict=True):
                if row["model"] == model and value is not None:
                    by_prompt[row["prompt_id"]].append(value)
            if by_prompt:
                reward[judge] = bootstrap_mean([float(np.mean(values)) for values in by_prompt.values()])
        measured = Cost() if model == "reference" else divergence(kl.filter(pc.equal(kl["model"], model)))
        costs[model] = replace(measured, reward=reward)
    return costs
