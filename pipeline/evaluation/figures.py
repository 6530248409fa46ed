"""Stage three without its command line: judgements by every judge, and the figures of eval.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts.schemas import JUDGEMENTS
from pipeline.config.experiment import Config
from pipeline.config.judges import HUMAN, IMPLICIT
from pipeline.config.losses import reference_free
from pipeline.evaluation.baselines import Pair, by_ending, length_baselines, pair_baselines, together
from pipeline.evaluation.kl import cost_figures
from pipeline.evaluation.rates import ratings
from pipeline.evaluation.rates.statistics import Interval, bootstrap_mean
from pipeline.evaluation.rates.winrates import WinRate, both_orders, by_topic, prompt_scores, win_rate
from pipeline.evaluation.results import (
    Baselines,
    HeldOut,
    OtherRate,
    People,
    Responses,
    Results,
    SideBySide,
    Split,
)
from pipeline.forward.logps import forward_of
from pipeline.hardware import device_kind
from pipeline.judges import marks
from pipeline.judges.judging import Comparison, Judge, Judgement, Shown, judge_both_orders, judge_implicitly
from pipeline.models.load import load_causal_lm
from pipeline.pairs.splits import prompt_id_of
from pipeline.training.inputs.pairs import load_pairs
from pipeline.training.policies import precision_of
from pipeline.training.step import pair_rewards


@torch.no_grad()
def judge_pairs(
    name: str, pairs_path: Path, model_directory: Path, config: Config
) -> tuple[list[Judgement], HeldOut, Baselines]:
    """The implicit judge: reward margins of the saved policy on the held-out pairs, their means, and what needs no policy."""
    scored = not reference_free(config.train)
    by_token = scored and config.train.ld_alpha is not None
    pairs = load_pairs(pairs_path, "eval", scored=scored, by_token=by_token)
    model = load_causal_lm(model_directory, config.policy, torch.float32).to(device_kind()).eval()
    precision = precision_of(config)
    chosen, rejected = pair_rewards(forward_of(model, config.train.layout, precision), pairs, config.train)
    margins = chosen - rejected
    ids = [prompt_id_of(list(tree.trunk)) for tree in pairs.trees]
    held_out = HeldOut(
        pairs=len(pairs),
        reward_accuracy=float((margins > 0).mean()),
        mean_margin=float(margins.mean()),
        mean_chosen_reward=float(chosen.mean()),
        mean_rejected_reward=float(rejected.mean()),
    )
    seen = [
        Pair(prompt_id, len(tree.branches[0]), len(tree.branches[1]), float(margin))
        for prompt_id, tree, margin in zip(ids, pairs.trees, margins, strict=True)
    ]
    return judge_implicitly(name, ids, margins.tolist()), held_out, pair_baselines(seen)


@dataclass(frozen=True)
class Said:
    """What a judge said of comparisons and of single responses. Of a judge that gives rewards: `margins`, by how much the
    model's is above the baseline's in each comparison, and the `rewards` of the single responses; else both are empty.
    """

    judgements: list[Judgement]
    margins: list[float | None] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)


def judge_texts(judge: Judge, comparisons: Sequence[Comparison], singles: Sequence[Shown]) -> Said:
    """A judge's judgements of the comparisons, and its rewards of all responses if it gives any."""
    if judge.reward is None:
        return Said(judge_both_orders(judge, comparisons))
    # all in one call: a judge that is a model is loaded once
    compared = [Shown(item.prompt, side) for item in comparisons for side in (item.response, item.against)]
    rewards = judge.reward([*compared, *singles])
    sides = zip(rewards[: len(compared) : 2], rewards[1 : len(compared) : 2], strict=True)
    margins = [None if own is None or other is None else own - other for own, other in sides]
    return Said(judge_both_orders(judge, comparisons), margins, rewards[len(compared) :])


def judgements_table(judgements: Sequence[Judgement]) -> pa.Table:
    """judgements.parquet's content."""
    return pa.Table.from_pylist([asdict(judgement) for judgement in judgements], schema=JUDGEMENTS)


def results_of(
    *,
    models: dict[str, str],
    pair_judge: str | None,
    learnt_from: str,
    shared: dict[str, list[str]],
    judgements: Sequence[Judgement],
    comparisons: Sequence[Comparison],
    samples: pa.Table,
    kl: pa.Table | None,
    rewards: dict[str, list[float | None]],
    judge_costs: dict[str, dict[str, float]],
    held_out: HeldOut | None,
    baselines: dict[str, Baselines],
    people: People | None,
    worse: list[SideBySide],
) -> Results:
    """Every figure of an evaluation, made of what it sampled and what judges said; still without a verdict in words.

    `models`: name -> what it is, in the order of tables. `rewards`: judge -> rewards of the rows of `kl`. `baselines`: those
    that do not follow from the judgements. `people`: how much they voted on, if they did.
    """
    wins = win_figures(judgements, comparisons)
    return Results(
        models=models,
        pair_judge=pair_judge,
        learnt_from=learnt_from,
        shared=shared,
        judges=wins.judges,
        people=people,
        baselines={
            judge: together(wins.baselines.get(judge, Baselines()), baselines.get(judge, Baselines()))
            for judge in wins.judges
        },
        endings=wins.endings,
        others=wins.others,
        topics=wins.topics,
        ratings=wins.ratings,
        responses=response_figures(samples, list(models)),
        cost=cost_figures(kl, rewards),
        judge_costs=judge_costs,
        held_out=held_out,
        worse=worse,
    )


@dataclass(frozen=True)
class WinFigures:
    """Win rates of every two models by every judge; the fields of `pipeline.evaluation.results.Results`."""

    ratings: dict[str, dict[str, Interval]]
    judges: dict[str, WinRate | None] = field(default_factory=dict)
    baselines: dict[str, Baselines] = field(default_factory=dict)
    endings: dict[str, dict[str, Split]] = field(default_factory=dict)
    others: list[OtherRate] = field(default_factory=list)
    topics: dict[str, dict[str, Interval]] = field(default_factory=dict)


def win_figures(judgements: Sequence[Judgement], comparisons: Sequence[Comparison]) -> WinFigures:
    """Win rates of every two models by every judge, ratings if there are three models, topics."""
    groups: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[judgement.model, judgement.baseline, judgement.judge].append(judgement)
    longer = _longer_by(comparisons)
    voted_on = {judgement.key for judgement in judgements if judgement.judge == HUMAN}
    longer_of_people = _longer_by([item for item in comparisons if item.key in voted_on])
    topics = {item.prompt.prompt_id: item.prompt.topic for item in comparisons}
    compared = [item for item in comparisons if (item.model, item.baseline) == ("policy", "reference")]
    figures = WinFigures(rated(groups))
    for (model, baseline, judge), judged in groups.items():
        # the implicit judge compares a pair's own responses, whose lengths are not those of the samples
        lengths = longer_of_people if judge == HUMAN else longer
        rate = win_rate(judged, None if judge == IMPLICIT else lengths.get((model, baseline)))
        if (model, baseline) == ("policy", "reference"):
            figures.judges[judge] = rate
            figures.topics[judge] = by_topic(judged, topics)
            if judge != IMPLICIT:
                figures.baselines[judge] = length_baselines(judged, compared)
                figures.endings[judge] = by_ending(judged, compared)
        else:
            figures.others.append(OtherRate(model, baseline, judge, rate))
    return figures


def rated(groups: dict[tuple[str, str, str], list[Judgement]]) -> dict[str, dict[str, Interval]]:
    """Bradley-Terry ratings relative to the reference, of judges that compared three models or more, each with it or with
    another that was.
    """
    by_judge: dict[str, dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for (model, baseline, judge), judged in groups.items():
        for prompt_id, score in prompt_scores(both_orders(judged)).items():
            by_judge[judge][prompt_id][model, baseline] = score
    rated = {}
    for judge, scores in by_judge.items():
        met = {two for of_prompt in scores.values() for two in of_prompt}
        # people may have been asked about some pairs of models only
        if len({name for two in met for name in two}) >= 3 and ratings.comparable(met, "reference"):
            rated[judge] = ratings.ratings(scores, "reference")
    return rated


def response_figures(samples: pa.Table, models: Sequence[str]) -> dict[str, Responses]:
    """What each model's responses look like."""
    return {model: _describe([row for row in samples.to_pylist() if row["model"] == model]) for model in models}


def worst_first(comparisons: Sequence[Comparison], judgements: Sequence[Judgement]) -> list[SideBySide]:
    """Policy against reference, prompt by prompt: what judges say the policy lost, largest loss first.

    `difference` is the mean over judges of texts of score minus one half, then of the marks of
    rule:complete_and_concise, which tells apart what judges call equal.
    """
    scores: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for judgement in judgements:
        if (
            (judgement.model, judgement.baseline) == ("policy", "reference")
            and judgement.order != "pair"
            and judgement.score is not None
        ):
            scores[judgement.prompt_id, judgement.sample][judgement.judge].append(judgement.score - 0.5)
    rows = []
    for item in comparisons:
        if (item.model, item.baseline) != ("policy", "reference"):
            continue
        marked = [
            marks.marks(item.prompt.text, side.text, side.finish_reason).score for side in (item.response, item.against)
        ]
        # people are asked in one order, and count no less for it
        said = [float(np.mean(of_judge)) for of_judge in scores[item.prompt.prompt_id, item.sample].values()]
        rows.append(
            SideBySide(
                prompt_id=item.prompt.prompt_id,
                sample=item.sample,
                topic=item.prompt.topic,
                prompt=item.prompt.text,
                policy=item.response.text,
                reference=item.against.text,
                policy_finish=item.response.finish_reason,
                reference_finish=item.against.finish_reason,
                difference=round(float(np.mean(said or [0.0])), 4),
                marks=round(marked[0] - marked[1], 4),
            )
        )
    return sorted(rows, key=lambda row: (row.difference, row.marks, row.prompt_id, row.sample))


def _longer_by(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], dict[str, float]]:
    """Mean difference of lengths in characters, by compared models and prompt."""
    differences: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for item in comparisons:
        difference = len(item.response.text) - len(item.against.text)
        differences[item.model, item.baseline][item.prompt.prompt_id].append(difference)
    return {
        models: {prompt_id: float(np.mean(values)) for prompt_id, values in by_prompt.items()}
        for models, by_prompt in differences.items()
    }


def _describe(rows: Sequence[dict[str, Any]]) -> Responses:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt_id"]].append(row["tokens"])
    return Responses(
        responses=len(rows),
        tokens=bootstrap_mean([float(np.mean(values)) for values in by_prompt.values()]),
        words=float(np.mean([len(row["response"].split()) for row in rows])),
        cut_off=float(np.mean([row["finish_reason"] == "length" for row in rows])),
        repetition=float(np.mean([marks.repetition(row["response"]) for row in rows])),
        empty=float(np.mean([not row["response"] for row in rows])),
    )
