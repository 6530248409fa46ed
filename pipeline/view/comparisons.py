"""What two models wrote and what every judge said of it, as one row per comparison: the index that pages filter and sort.

Texts are not in it. A row's place in the index is its number everywhere: in addresses of pages of rows and in searches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import JUDGEMENTS, KL, SAMPLES
from pipeline.errors import DataError
from pipeline.evaluation.rates.winrates import SUREST, VERDICTS
from pipeline.report.side_by_side import visible
from pipeline.view.pages import Stamp, columns, stamp

# a letter per row and judge: won, tied, lost, failed, or nothing said; in small letters if the judge contradicted itself
WON, TIED, LOST, FAILED, ABSENT = "W", "T", "L", "X", "-"
# rows of a page, and of a file of the static folder
PAGE = 50
# characters of a prompt that stand for it in a table
_START = 90
_SAMPLE = ["prompt_id", "sample", "model", "topic", "finish_reason", "tokens"]
_VERDICT = ["prompt_id", "sample", "judge", "model", "baseline", "order", "score"]


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of two models. `prompts`: each with its topic, the start of its text and the KL of the model's samples;
    `table`: a row per comparison, with the places of both responses in samples.parquet (`row`, `row_baseline`); `judges`: name
    -> letters and scores, by row; a score is the model's, NaN if there is none.
    """

    model: str
    baseline: str
    prompts: pl.DataFrame
    table: pl.DataFrame
    judges: Mapping[str, tuple[str, np.ndarray]]

    def described(self) -> dict[str, Any]:
        """The columns of the index for JSON: of prompts, of comparisons (`prompt` is a prompt's number), and of judges."""
        table, prompts = self.table, self.prompts
        topics = prompts["topic"].fill_null("").unique(maintain_order=True).to_list()
        topic, place = ({name: number for number, name in enumerate(names)} for names in (topics, prompts["prompt_id"]))
        return {
            "model": self.model,
            "baseline": self.baseline,
            "page": PAGE,
            "topics": [visible(name) for name in topics],
            "prompts": {
                "prompt_id": prompts["prompt_id"].to_list(),
                "topic": [topic[name or ""] for name in prompts["topic"]],
                "start": [visible(start) for start in prompts["start"]],
                "kl": _rounded(prompts["kl"].to_numpy()),
            },
            "prompt": [place[prompt_id] for prompt_id in table["prompt_id"]],
            "sample": table["sample"].to_list(),
            "tokens": table["tokens"].to_list(),
            "baseline_tokens": table["tokens_baseline"].to_list(),
            "cut": _flags(table["finish_reason"] == "length", table["finish_reason_baseline"] == "length"),
            "judges": [
                {"name": name, "letters": letters, "scores": _rounded(scores)}
                for name, (letters, scores) in self.judges.items()
            ],
        }


def compared_models(run: Run) -> list[tuple[str, str]]:
    """Every two models whose samples are compared: those that judges compared, or all if nothing is judged yet."""
    return _compared(run.samples, stamp(run.samples), run.judgements, stamp(run.judgements))


@lru_cache(maxsize=8)
def _compared(samples: Path, _samples: Stamp, judgements: Path, judged: Stamp) -> list[tuple[str, str]]:
    if judged:
        said = columns(judgements, JUDGEMENTS, ["model", "baseline", "order"]).filter(pl.col("order") != "pair")
        pairs = said.select("model", "baseline").unique(maintain_order=True).rows()
        if pairs:
            return [(str(model), str(baseline)) for model, baseline in pairs]
    models = columns(samples, SAMPLES, ["model"])["model"].unique(maintain_order=True).to_list()
    return list(combinations(models, 2))


def models_of(run: Run, number: int) -> tuple[str, str]:
    """The `number`-th two models of `compared_models`. Raises DataError if there are not so many."""
    pairs = compared_models(run)
    if not 0 <= number < len(pairs):
        raise DataError(f"run {run.name} compares {len(pairs)} pairs of models, and no number {number}")
    return pairs[number]


def comparisons(run: Run, number: int) -> Comparisons:
    """The comparisons of the `number`-th two models of `compared_models`. Raises DataError if there are not so many."""
    stamps = stamp(run.samples), stamp(run.judgements), stamp(run.kl)
    return _comparisons(run, *models_of(run, number), stamps)


@lru_cache(maxsize=8)
def _comparisons(run: Run, model: str, baseline: str, stamps: tuple[Stamp, Stamp, Stamp]) -> Comparisons:
    samples = columns(run.samples, SAMPLES, _SAMPLE)
    mine, theirs = (samples.filter(pl.col("model") == name).drop("model") for name in (model, baseline))
    table = mine.join(theirs, on=["prompt_id", "sample"], suffix="_baseline", maintain_order="left")
    prompts = table.unique("prompt_id", keep="first", maintain_order=True).select("prompt_id", "topic")
    starts = (
        pl.scan_parquet(run.samples)
        .select("prompt_id", pl.col("prompt").str.slice(0, _START).alias("start"))
        .unique("prompt_id", keep="first")
        .collect()
    )
    for found in (starts, _kl(run, model, stamps[2])):
        prompts = prompts.join(found, on="prompt_id", how="left", maintain_order="left")
    judged = columns(run.judgements, JUDGEMENTS, _VERDICT) if stamps[1] else None
    judges = {} if judged is None else _judges(table, judged, model, baseline)
    return Comparisons(model, baseline, prompts, table.drop("topic", "topic_baseline"), judges)


def _kl(run: Run, model: str, there: Stamp) -> pl.DataFrame:
    """Per prompt the mean of log policy minus log reference over the model's samples of kl.parquet, in nats per response."""
    if not there:
        return pl.DataFrame(schema={"prompt_id": pl.String, "kl": pl.Float64})
    scored = columns(run.kl, KL, ["prompt_id", "model", "logp", "ref_logp"]).filter(pl.col("model") == model)
    return scored.group_by("prompt_id").agg((pl.col("logp") - pl.col("ref_logp")).mean().alias("kl"))


def _judges(table: pl.DataFrame, judged: pl.DataFrame, model: str, baseline: str) -> dict[str, tuple[str, np.ndarray]]:
    """Letters and scores of every judge by the table's rows, as `pipeline.evaluation.rates.winrates.both_orders` has them."""
    of_these = judged.filter(
        (pl.col("model") == model) & (pl.col("baseline") == baseline) & (pl.col("order") != "pair")
    )
    judges = {}
    for name in of_these["judge"].unique(maintain_order=True).to_list():
        said = of_these.filter(pl.col("judge") == name)
        shades = not said["score"].drop_nulls().is_in(VERDICTS).all()
        chance = pl.col("score").clip(1 - SUREST, SUREST)
        # without shades a contradiction is a tie; with them the log-odds of both orders are averaged
        mean = (
            (1 / (1 + (-(chance / (1 - chance)).log().mean()).exp())).round(12)
            if shades
            else pl.when((pl.col("score") > 0.5).any() & (pl.col("score") < 0.5).any())
            .then(0.5)
            .otherwise(pl.col("score").mean())
        )
        found = said.group_by("prompt_id", "sample").agg(
            pl.col("score").is_null().any().alias("failed"),
            ((pl.col("score") > 0.5).any() & (pl.col("score") < 0.5).any()).alias("flipped"),
            mean.alias("score"),
        )
        by_row = table.select("prompt_id", "sample").join(
            found, on=["prompt_id", "sample"], how="left", maintain_order="left"
        )
        judges[name] = _letters(by_row)
    return judges


def _letters(by_row: pl.DataFrame) -> tuple[str, np.ndarray]:
    score, flipped = pl.col("score"), pl.col("flipped").fill_null(value=False)
    outcome = (
        pl.when(pl.col("failed").is_null())
        .then(pl.lit(ABSENT))
        .when(pl.col("failed"))
        .then(pl.lit(FAILED))
        .when(score > 0.5)
        .then(pl.lit(WON))
        .when(score < 0.5)
        .then(pl.lit(LOST))
        .otherwise(pl.lit(TIED))
    )
    letters = by_row.select(pl.when(flipped).then(outcome.str.to_lowercase()).otherwise(outcome).alias("letters"))[
        "letters"
    ]
    scores = by_row.select(pl.when(pl.col("failed")).then(None).otherwise(score).alias("score"))["score"]
    return "".join(letters.to_list()), scores.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _rounded(values: np.ndarray) -> list[float | None]:
    kept = np.round(np.asarray(values, np.float64), 4)
    return [None if math.isnan(value) else value for value in kept.tolist()]


def _flags(first: pl.Series, second: pl.Series) -> list[int]:
    """1: the first is so, 2: the second, 3: both."""
    return (first.fill_null(value=False).cast(pl.Int8) + 2 * second.fill_null(value=False).cast(pl.Int8)).to_list()
