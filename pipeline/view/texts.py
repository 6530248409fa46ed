"""The rows of pages with their texts: responses side by side, verdicts with the judge's words, tokens with their scores.

Every text has characters that hide, end or reorder text shown as code points; a page then shows it as text alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import JUDGEMENTS, KL, SAMPLES
from pipeline.errors import DataError
from pipeline.report.side_by_side import differing, visible
from pipeline.view.comparisons import PAGE, Comparisons, comparisons
from pipeline.view.pages import Stamp, columns, rows, stamp
from pipeline.view.pieces import pieces

# a sign that pages write out as its code point, in a text that was escaped for a pattern
_WRITTEN_OUT = re.compile(r"\\\[U\\\+([0-9A-F]{4})\\\]")
_SHOWN = ["prompt", "response", "finish_reason", "tokens"]


def samples_page(run: Run, number: int, page: int) -> dict[str, Any]:
    """Rows `PAGE * page` and on of the `number`-th comparisons: prompt, both responses, what differs, every verdict."""
    index = comparisons(run, number)
    first = first_of(page, len(index.table))
    part = index.table.slice(first, PAGE)
    mine = rows(run.samples, SAMPLES, part["row"].to_list(), _SHOWN)
    theirs = rows(run.samples, SAMPLES, part["row_baseline"].to_list(), ["response", "finish_reason", "tokens"])
    verdicts = _verdicts(run, index, part)
    of_kl = _kl_rows(run.kl, stamp(run.kl))
    found = []
    for place, own, other in zip(part.select("prompt_id", "sample").rows(), mine, theirs, strict=True):
        prompt_id, sample = place
        found.append(
            {
                "prompt_id": prompt_id,
                "sample": sample,
                "prompt": visible(own["prompt"]),
                "responses": [_side(own), _side(other)],
                "parts": differing(own["response"].strip(), other["response"].strip()),
                "verdicts": verdicts.get((prompt_id, sample), []),
                "kl_rows": [of_kl.get((prompt_id, model), []) for model in (index.model, index.baseline)],
            }
        )
    return {"first": first, "rows": found}


def tokens_page(run: Run, page: int) -> dict[str, Any]:
    """Rows of kl.parquet: tokens of samples at temperature 1, with the log-probability of each under model and reference."""
    total = len(columns(run.kl, KL, ["sample"]))
    first = first_of(page, total)
    places = list(range(first, min(first + PAGE, total)))
    found = rows(
        run.kl, KL, places, ["prompt_id", "sample", "model", "response_ids", "finish_reason", "logps", "ref_logps"]
    )
    return {
        "first": first,
        "rows": [
            {
                "prompt_id": row["prompt_id"],
                "sample": row["sample"],
                "model": row["model"],
                "finish_reason": row["finish_reason"],
                "pieces": [visible(piece) for piece in pieces(run, row["response_ids"])],
                "logps": short(row["logps"]),
                "ref_logps": short(row["ref_logps"]),
            }
            for row in found
        ],
    }


def search(run: Run, number: int, text: str) -> list[int]:
    """The rows of the `number`-th comparisons whose prompt or responses have `text` in them, in whatever case. A sign that pages
    write out as its code point is found by that.
    """
    index = comparisons(run, number)
    pattern = f"(?i){_WRITTEN_OUT.sub(_or_the_sign, re.escape(text))}"
    try:
        hit = (
            pl.scan_parquet(run.samples)
            .with_row_index("row")
            .filter(pl.col("prompt").str.contains(pattern) | pl.col("response").str.contains(pattern))
            .select("row")
            .collect()["row"]
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{run.samples} cannot be searched ({str(error).splitlines()[0]})") from None
    table = index.table.with_row_index("place")
    return table.filter(pl.col("row").is_in(hit.implode()) | pl.col("row_baseline").is_in(hit.implode()))[
        "place"
    ].to_list()


def _or_the_sign(written: re.Match[str]) -> str:
    return f"(?:{written[0]}|{re.escape(chr(int(written[1], 16)))})"


def first_of(page: int, total: int) -> int:
    """The number of the first row of a page. Raises DataError for a page that there is not."""
    if page < 0 or (page * PAGE >= total and page > 0):
        raise DataError(f"no page {page}: there are {total} rows, {PAGE} on a page")
    return page * PAGE


def _side(row: dict[str, Any]) -> dict[str, Any]:
    text = row["response"].strip()
    return {"text": visible(text), "finish_reason": row["finish_reason"], "tokens": row["tokens"]}


def _verdicts(run: Run, index: Comparisons, part: pl.DataFrame) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Every verdict on the comparisons of `part`, both orders, with the judge's words."""
    there = stamp(run.judgements)
    if not there:
        return {}
    said = _said(run.judgements, there).filter(
        (pl.col("model") == index.model)
        & (pl.col("baseline") == index.baseline)
        & (pl.col("order") != "pair")
        & pl.col("prompt_id").is_in(part["prompt_id"].unique().to_list())
    )
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    names = ["prompt_id", "sample", "judge", "order", "winner", "score", "words"]
    for row in rows(run.judgements, JUDGEMENTS, said["row"].to_list(), names):
        verdict = {name: row[name] for name in ("judge", "winner", "score")}
        verdict["words"] = None if row["words"] is None else visible(row["words"])
        verdict["first"] = row["order"].removesuffix("_first")
        found.setdefault((row["prompt_id"], row["sample"]), []).append(verdict)
    return found


@lru_cache(maxsize=4)
def _said(path: Path, _version: Stamp) -> pl.DataFrame:
    return columns(path, JUDGEMENTS, ["prompt_id", "model", "baseline", "order"]).with_columns(
        pl.col("model", "baseline", "order").cast(pl.Categorical)
    )


@lru_cache(maxsize=4)
def _kl_rows(path: Path, version: Stamp) -> dict[tuple[str, str], list[int]]:
    """The rows of kl.parquet by prompt and model."""
    if not version:
        return {}
    frame = columns(path, KL, ["prompt_id", "model"])
    found: dict[tuple[str, str], list[int]] = {}
    for row, prompt_id, model in frame.rows():
        found.setdefault((prompt_id, model), []).append(row)
    return found


def short(values: Iterable[float | None] | None) -> list[float | None] | None:
    """Values for JSON with six digits; what is no finite number is None."""
    if values is None:
        return None
    return [None if value is None or not math.isfinite(value) else float(f"{value:.6g}") for value in values]
