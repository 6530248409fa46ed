"""What training cost: how far the policy has moved from the reference, KL(policy || reference) in nats a response.

Measured as in the DPO paper's figure 2 on responses that the policy itself samples at temperature 1 without truncation of
the distribution, each scored under both models by stage one's scorer: the mean over prompts of log pi(y|x) -
log pi_ref(y|x), summed over the response's tokens. Responses are cut at `generate.max_tokens`, so it is the divergence
of what is generated, not of endless responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.runs import Run
from pipeline.artifacts.tables import KL, write_table
from pipeline.config.experiment import GenerateConfig
from pipeline.config.files import digest
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference
from pipeline.engines.start import start_scorer
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.samples import generation_key, stored_samples
from pipeline.evaluation.statistics import bootstrap_mean
from pipeline.judges.judging import Prompt
from pipeline.progress import SILENT, Listener


def on_policy(settings: GenerateConfig, dtype: str) -> GenerateConfig:
    """The settings under which KL is measured: temperature 1, nothing cut off, sampled in the dtype that scores."""
    return settings.model_copy(
        update={"temperature": 1.0, "top_p": 1.0, "samples": settings.kl_samples, "dtype": dtype}
    )


def measure_kl(
    settings: GenerateConfig,
    reference: OpenedReference,
    run: Run,
    prompts: Sequence[Prompt],
    models: Sequence[Candidate],
    samples: Mapping[str, pa.Table],
    listener: Listener = SILENT,
) -> pa.Table | None:
    """Write kl.parquet and return its rows; None if no samples for KL are asked for.

    `samples`: those of the models whose KL no run has measured yet, at temperature 1; each is scored under its model and
    under the last of `models`.
    """
    if not settings.kl_samples:
        return None
    baseline = models[-1]
    tables = {
        model.name: stored
        for model in models
        if model.name not in samples
        and (stored := stored_kl(settings, reference, run, prompts, model, baseline)) is not None
    }
    new = [model for model in models if model.name in samples and model is not baseline]
    if new:
        listener.say(f"scoring   responses of {', '.join(model.name for model in new)} for KL, under each model")
        own = {model.name: score_responses(reference, model.merged(), prompts, samples[model.name]) for model in new}
        together = pa.concat_tables([samples[model.name] for model in new])
        under = iter(score_responses(reference, baseline.merged(), prompts, together))
        for model in new:
            logps = own[model.name]
            tables[model.name] = kl_table(samples[model.name], logps, [next(under) for _ in logps])
    if baseline.name in samples:
        tables[baseline.name] = kl_table(samples[baseline.name], None, None)
    keys = {model.name: _kl_key(settings, reference, prompts, model, baseline) for model in models}
    table = pa.concat_tables([tables[model.name] for model in models])
    write_table(run.kl, table, {"keys": keys})
    return table


def stored_kl(
    settings: GenerateConfig,
    reference: OpenedReference,
    run: Run,
    prompts: Sequence[Prompt],
    model: Candidate,
    baseline: Candidate,
) -> pa.Table | None:
    """A model's rows of any run's kl.parquet that were made and scored under the same settings and models."""
    key = _kl_key(settings, reference, prompts, model, baseline)
    return stored_samples(key, model.name, run.kl.name, KL)


def _kl_key(
    settings: GenerateConfig,
    reference: OpenedReference,
    prompts: Sequence[Prompt],
    model: Candidate,
    baseline: Candidate,
) -> str:
    made = generation_key(model, prompts, on_policy(settings, reference.numerics.dtype))
    return digest({"samples": made, "reference": baseline.digest, "numerics": vars(reference.numerics)})


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


def divergence(table: pa.Table) -> dict[str, Any]:
    """KL's figures for one model's rows of kl.parquet: nats a response, with an interval over prompts; nats a token.

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
    return {
        "kl": asdict(bootstrap_mean([float(np.mean(values)) for values in sums.values()])),
        "low_variance": asdict(bootstrap_mean([float(np.mean(values)) for values in others.values()])),
        "per_token": sum(map(sum, sums.values())) / max(1, tokens),
        "responses": len(table),
        "tokens": tokens,
    }
