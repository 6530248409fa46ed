"""Stage three without its command line: judgements by every judge, and the figures of eval.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.artifacts.tables import JUDGEMENTS
from pipeline.config.experiment import Config
from pipeline.config.losses import reference_free
from pipeline.evaluation import ratings
from pipeline.evaluation.kl import divergence
from pipeline.evaluation.statistics import bootstrap_mean, prompts_for
from pipeline.evaluation.winrates import WinRate, by_topic, comparison_scores, prompt_scores, win_rate
from pipeline.forward.logps import forward_of
from pipeline.hardware import device_kind
from pipeline.judges import marks
from pipeline.judges.judging import Comparison, Judge, Judgement, Shown, judge_both_orders, judge_implicitly
from pipeline.models.load import load_causal_lm
from pipeline.pairs.stream import prompt_id_of
from pipeline.training.examples import load_pairs
from pipeline.training.policies import precision_of
from pipeline.training.step import pair_rewards

# a difference of win rates that people care about, for "how many prompts would it take"
WORTH_SEEING = 0.05


@torch.no_grad()
def judge_pairs(
    name: str, pairs_path: Path, model_directory: Path, config: Config
) -> tuple[list[Judgement], dict[str, float]]:
    """The implicit judge: reward margins of the saved policy on the held-out pairs, and their means."""
    pairs = load_pairs(pairs_path, "eval", scored=not reference_free(config.train))
    model = load_causal_lm(model_directory, config.policy, torch.float32).to(device_kind()).eval()
    precision = precision_of(config.train)
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
    return judge_implicitly(name, ids, margins.tolist()), figures


def judge_texts(
    judge: Judge, comparisons: Sequence[Comparison], singles: Sequence[Shown]
) -> tuple[list[Judgement], list[float | None]]:
    """A judge's judgements of the comparisons, and its rewards of `singles` where it gives any (else an empty list)."""
    if judge.reward is None:
        return judge_both_orders(judge, comparisons), []
    # all in one call: a judge that is a model is loaded once
    compared = [Shown(item.prompt, side) for item in comparisons for side in (item.response, item.against)]
    rewards = judge.reward([*compared, *singles])
    return judge_both_orders(judge, comparisons), rewards[len(compared) :]


def judgements_table(judgements: Sequence[Judgement]) -> pa.Table:
    """judgements.parquet's content."""
    return pa.Table.from_pylist([asdict(judgement) for judgement in judgements], schema=JUDGEMENTS)


def win_figures(judgements: Sequence[Judgement], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Win rates of every two models by every judge, ratings where there are three, topics.

    `judges`: policy against reference; `others`: every other two models, as a list; `ratings`: judge -> model -> rating.
    """
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for one in judgements:
        groups[one.model, one.baseline, one.judge].append(one)
    longer = _longer_by(comparisons)
    topics = {item.prompt.prompt_id: item.prompt.topic for item in comparisons}
    judges: dict[str, Any] = {}
    others: list[dict[str, Any]] = []
    by_topics: dict[str, Any] = {}
    for (model, baseline, judge), found in groups.items():
        rate = win_rate(found, longer.get((model, baseline)))
        if (model, baseline) == ("policy", "reference"):
            judges[judge] = _plain(rate, found)
            by_topics[judge] = {topic: asdict(one) for topic, one in by_topic(found, topics).items()}
        else:
            others.append({"model": model, "baseline": baseline, "judge": judge, "rate": _plain(rate, found)})
    return {"judges": judges, "others": others, "topics": by_topics, "ratings": rated(groups)}


def rated(groups: dict[tuple[str, str, str], list[Judgement]]) -> dict[str, dict[str, Any]]:
    """Bradley-Terry ratings relative to the reference, of judges that compared three models or more."""
    by_judge: dict[str, dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for (model, baseline, judge), found in groups.items():
        for prompt_id, score in prompt_scores(comparison_scores(found)).items():
            by_judge[judge][prompt_id][model, baseline] = score
    rated = {}
    for judge, scores in by_judge.items():
        models = {name for met in scores.values() for two in met for name in two}
        if len(models) >= 3 and "reference" in models:
            rated[judge] = {name: asdict(one) for name, one in ratings.ratings(scores, "reference").items()}
    return rated


def response_figures(samples: pa.Table, models: Sequence[str]) -> dict[str, Any]:
    """What each model's responses look like."""
    return {model: _describe([row for row in samples.to_pylist() if row["model"] == model]) for model in models}


def cost_figures(kl: pa.Table | None, rewards: dict[str, list[float | None]]) -> dict[str, Any]:
    """What training cost each model and what it got for it, both on responses at temperature 1.

    `kl`: kl.parquet, the reference's responses too; `rewards`: judge -> rewards of its rows.
    """
    found: dict[str, Any] = {}
    if kl is None:
        return found
    rows = kl.select(["model", "prompt_id"]).to_pylist()
    for model in dict.fromkeys(row["model"] for row in rows):
        found[model] = {} if model == "reference" else divergence(kl.filter(pc.equal(kl["model"], model)))
        found[model]["reward"] = {}
        for judge, values in rewards.items():
            by_prompt: dict[str, list[float]] = defaultdict(list)
            for row, value in zip(rows, values, strict=True):
                if row["model"] == model and value is not None:
                    by_prompt[row["prompt_id"]].append(value)
            if by_prompt:
                means = [float(np.mean(found_values)) for found_values in by_prompt.values()]
                found[model]["reward"][judge] = asdict(bootstrap_mean(means))
    return found


def worst_first(comparisons: Sequence[Comparison], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Policy against reference, prompt by prompt: what judges say the policy lost, largest loss first.

    `difference` is the mean over judges of texts of score minus one half, then of the marks of
    rule:complete_and_concise, which tells apart what judges call equal.
    """
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for one in judgements:
        if (one.model, one.baseline) == ("policy", "reference") and one.order != "pair" and one.score is not None:
            scores[one.prompt_id, one.sample].append(one.score - 0.5)
    rows = []
    for item in comparisons:
        if (item.model, item.baseline) != ("policy", "reference"):
            continue
        marked = [
            marks.marks(item.prompt.text, side.text, side.finish_reason).score for side in (item.response, item.against)
        ]
        said = scores.get((item.prompt.prompt_id, item.sample), [0.0])
        rows.append(
            {
                "prompt_id": item.prompt.prompt_id,
                "sample": item.sample,
                "topic": item.prompt.topic,
                "prompt": item.prompt.text,
                "policy": item.response.text,
                "reference": item.against.text,
                "policy_finish": item.response.finish_reason,
                "reference_finish": item.against.finish_reason,
                "difference": round(float(np.mean(said)), 4),
                "marks": round(marked[0] - marked[1], 4),
            }
        )
    return sorted(rows, key=lambda row: (row["difference"], row["marks"], row["prompt_id"], row["sample"]))


def _plain(rate: WinRate | None, judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    if rate is None:
        return None
    scores = list(prompt_scores(comparison_scores(judgements)).values())
    return asdict(rate) | {"prompts_needed": prompts_for(scores, WORTH_SEEING)}


def _longer_by(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], dict[str, float]]:
    """Mean difference of lengths in characters, by compared models and prompt."""
    found: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for item in comparisons:
        difference = len(item.response.text) - len(item.against.text)
        found[item.model, item.baseline][item.prompt.prompt_id].append(difference)
    return {
        models: {prompt_id: float(np.mean(values)) for prompt_id, values in by_prompt.items()}
        for models, by_prompt in found.items()
    }


def _describe(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row["tokens"])
    return {
        "responses": len(rows),
        "tokens": asdict(bootstrap_mean([float(np.mean(values)) for values in by_prompt.values()])),
        "words": float(np.mean([len(row["response"].split()) for row in rows])),
        "cut_off": float(np.mean([row["finish_reason"] == "length" for row in rows])),
        "repetition": float(np.mean([marks.repetition(row["response"]) for row in rows])),
        "empty": float(np.mean([not row["response"] for row in rows])),
    }
