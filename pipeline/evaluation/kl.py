"""What training cost: how far the policy has moved from the reference, KL(policy || reference) in nats per response.

Measured as in the DPO paper's figure 2 on responses that the policy itself samples at temperature 1 without truncation of
the distribution, each scored under both models by stage one's scorer: the mean over prompts of log pi(y|x) -
log pi_ref(y|x), summed over the response's tokens. Responses are cut at `generate.max_tokens`, so it is the divergence
of what is generated, not of endless responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.schemas import KL
from pipeline.config.experiment import GenerateConfig
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference
from pipeline.engines.start import start_scorer
from pipeline.evaluation.rates.statistics import Interval, bootstrap_mean
from pipeline.evaluation.results import CONTROL_VARIATE, END, EXACT, SAMPLED, Cost, Estimate, Position
from pipeline.judges.judging import Prompt

# positions of the first part of a response
_FIRST_POSITIONS = 8


def on_policy(settings: GenerateConfig, dtype: str) -> GenerateConfig:
    """The settings under which KL is measured: the policy's own distribution, in the dtype that scores.

    Temperature 1, every token that has a probability, ends included: samples from which ends are left out are not the policy's.
    """
    return settings.model_copy(
        update={"temperature": 1.0, "top_p": 1.0, "fixed_length": False, "samples": settings.kl_samples, "dtype": dtype}
    )


def requests_of(prompts: Sequence[Prompt], table: pa.Table) -> list[Request]:
    """The table's responses after their own prompts, in order."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [Request(by_id[row["prompt_id"]].ids, row["response_ids"]) for row in table.to_pylist()]


def score_responses(
    reference: OpenedReference, directory: Path, prompts: Sequence[Prompt], table: pa.Table
) -> list[np.ndarray]:
    """Logps of the table's responses, in order, under the model in `directory`, in the reference's numerics."""
    requests = requests_of(prompts, table)
    with start_scorer(reference.config, directory, reference.numerics, max(map(len, requests))) as scorer:
        return list(scorer.score(requests))


def kl_table(samples: pa.Table, logps: Sequence[np.ndarray] | None, ref_logps: Sequence[np.ndarray] | None) -> pa.Table:
    """kl.parquet's content: samples with both models' scores, sums in float64; without if either is not known."""
    rows = samples.to_pylist()
    if logps is None or ref_logps is None:
        return pa.Table.from_pylist(rows, schema=KL)
    for row, own, ref in zip(rows, logps, ref_logps, strict=True):
        row |= {"logps": own, "ref_logps": ref}
        row |= {"logp": float(own.sum(dtype=np.float64)), "ref_logp": float(ref.sum(dtype=np.float64))}
    return pa.Table.from_pylist(rows, schema=KL)


def divergence(table: pa.Table) -> Cost:
    """KL's figures for one model's rows of kl.parquet: nats per response, with an interval over prompts; nats per token.

    Three unbiased estimates of one number. SAMPLED: the sum of log pi - log pi_ref of the tokens drawn. CONTROL_VARIATE: to
    each of them r - 1 with r = pi_ref / pi is added, whose mean is 0 (Schulman 2020, "Approximating KL divergence"): never
    negative, of less variance only where the models are close. EXACT: the mean over all tokens instead of the one drawn, see
    `pipeline.evaluation.exact_kl`. Far from each other they say that there are too few samples.
    """
    rows = [_Row.of(row) for row in table.to_pylist()]
    sums = _by_prompt(rows, lambda row: float(row.gaps.sum()))
    per_prompt = {
        SAMPLED: sums,
        CONTROL_VARIATE: _by_prompt(rows, lambda row: float((np.expm1(-row.gaps) + row.gaps).sum())),
    }
    if exact := _exact_sums(rows):
        per_prompt[EXACT] = exact
    tokens = sum(len(row.gaps) for row in rows)
    return Cost(
        kl=bootstrap_mean(sums),
        estimates={name: _estimate(values, sums) for name, values in per_prompt.items()},
        positions=_positions(rows),
        per_token=sum(float(row.gaps.sum()) for row in rows) / max(1, tokens),
        responses=len(rows),
        tokens=tokens,
    )


@dataclass(frozen=True)
class _Row:
    """A response's log-ratios and exact divergences, token by token; `ended`: the last one is the end that the model wrote."""

    prompt_id: str
    gaps: np.ndarray
    exact: np.ndarray | None
    ended: bool

    @classmethod
    def of(cls, row: dict[str, Any]) -> _Row:
        gaps = np.asarray(row["logps"], dtype=np.float64) - np.asarray(row["ref_logps"], dtype=np.float64)
        exact = None if row.get("exact_kl") is None else np.asarray(row["exact_kl"], dtype=np.float64)
        return cls(row["prompt_id"], gaps, exact, row.get("finish_reason") == "stop")

    def at(self, where: str) -> np.ndarray:
        """Which tokens are at these positions: END, or "<first> to <last>" counted from 1, without the end."""
        places = np.arange(1, len(self.gaps) + 1)
        is_end: np.ndarray = (places == len(places)) & self.ended
        if where != END:
            first, last = map(int, where.split(" to "))
            is_end = ~is_end & (first <= places) & (places <= last)
        return is_end


def _by_prompt(rows: Sequence[_Row], figure: Callable[[_Row], float]) -> list[float]:
    """A figure's mean over each prompt's responses."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row.prompt_id].append(figure(row))
    return [float(np.mean(of_prompt)) for of_prompt in values.values()]


def _estimate(values: Sequence[float], sampled: Sequence[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(bootstrap_mean(values))
    variance = float(np.var(values, ddof=1))
    ratio = float(np.var(sampled, ddof=1)) / variance if variance else None
    return Estimate(bootstrap_mean(values), float(np.sqrt(variance / len(values))), ratio)


def _positions(rows: Sequence[_Row]) -> list[Position]:
    """Positions in parts that double, then the end token, those that no response has left out."""
    longest = max((len(row.gaps) for row in rows), default=0)
    edges = [0, _FIRST_POSITIONS]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    parts = [f"{after + 1} to {last}" for after, last in pairwise(edges)]
    found = []
    for where in [*parts, END]:
        tokens = sum(int(row.at(where).sum()) for row in rows)
        if tokens:
            sampled = _by_prompt(rows, partial(_gap_at, where))
            exact = _exact_sums(rows, where)
            found.append(Position(where, tokens, float(np.mean(sampled)), float(np.mean(exact)) if exact else None))
    return found


def _gap_at(where: str, row: _Row) -> float:
    return float(row.gaps[row.at(where)].sum())


def _exact_sums(rows: Sequence[_Row], where: str | None = None) -> list[float]:
    """Each prompt's exact divergence at some positions, or at all; empty if that of any response is not known."""
    sums = [
        None if row.exact is None else float(row.exact[row.at(where) if where else slice(None)].sum()) for row in rows
    ]
    if any(value is None for value in sums):
        return []
    values = iter(sums)
    return _by_prompt(rows, lambda _: next(values) or 0.0)


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
        of_model = kl.filter(pc.equal(kl["model"], model))
        measured = Cost() if model == "reference" else divergence(of_model)
        costs[model] = replace(measured, reward=reward, perplexity=perplexity(of_model))
    return costs


def perplexity(table: pa.Table) -> float | None:
    """How unlikely one model's rows of kl.parquet are under the reference: exp of the mean nats per token; None if not scored."""
    tokens = pc.sum(table["tokens"]).as_py()
    if table["ref_logp"].null_count or not tokens:
        return None
    return float(np.exp(-pc.sum(table["ref_logp"]).as_py() / tokens))
