"""The training and held-out pairs: the reference's scores per token, what the policy thought of each, and what was dropped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import polars as pl

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import DROPPED, PAIRS, POLICY_LOGPS
from pipeline.errors import DataError
from pipeline.report.side_by_side import differing, visible
from pipeline.view.comparisons import PAGE
from pipeline.view.pages import Stamp, columns, rows, stamp
from pipeline.view.pieces import pieces
from pipeline.view.texts import first_of, short

# pairs of an index: what a browser filters and sorts in a moment
MOST = 200_000
# characters of a prompt that stand for a pair in a table
_START = 60
_SIDES = ("chosen", "rejected")
_SUMS = [f"ref_{side}_logps" for side in _SIDES]
_PAIR = ["prompt", "topic", "source", "source_row", "split", "chosen", "rejected"]


def pairs_index(run: Run) -> dict[str, Any]:
    """One row per pair, the first `MOST` of all `total`: split, topic, lengths in tokens, and in nats per response the sums of
    the reference and, if a training kept them, of the policy when it last saw the pair, after `step` updates.
    """
    _must_have_pairs(run)
    table = _index(run, (stamp(run.pairs), stamp(run.policy_logps)))
    kept = table.head(MOST)
    topics = kept["topic"].fill_null("").unique(maintain_order=True).to_list()
    number = {topic: place for place, topic in enumerate(topics)}
    return {
        "total": len(table),
        "page": PAGE,
        "topics": [visible(topic) for topic in topics],
        "pair_id": kept["pair_id"].to_list(),
        "start": [visible(start or "") for start in kept["start"]],
        "held_out": [split == "eval" for split in kept["split"]],
        "topic": [number[topic or ""] for topic in kept["topic"]],
        "tokens": [kept[f"{side}_tokens"].to_list() for side in _SIDES],
        "reference": [short(kept[name]) for name in _SUMS],
        "policy": [short(kept[f"{side}_last"]) for side in _SIDES],
        "step": kept["step_last"].to_list(),
    }


def pairs_page(run: Run, page: int) -> dict[str, Any]:
    """Rows `PAGE * page` and on of pairs.parquet, with texts and the reference's log-probability of every response token."""
    _must_have_pairs(run)
    total = min(len(_index(run, (stamp(run.pairs), stamp(run.policy_logps)))), MOST)
    first = first_of(page, total)
    places = list(range(first, min(first + PAGE, total)))
    lists = [name for side in _SIDES for name in (f"{side}_ids", f"ref_{side}_token_logps")]
    found = rows(run.pairs, PAIRS, places, ["pair_id", *_PAIR, *lists])
    return {"first": first, "rows": [_shown(run, row) for row in found]}


def dropped(run: Run) -> dict[str, Any]:
    """Rows of the data that are no pairs: how many by reason, and the first `MOST` of them."""
    table = columns(run.dropped, DROPPED, ["source", "source_row", "reason", "detail"])
    kept = table.head(MOST)
    return {
        "total": len(table),
        "reasons": table["reason"].value_counts(sort=True).rows(),
        "rows": [
            [visible(source or ""), row, reason, visible(detail or "")]
            for source, row, reason, detail in kept.select("source", "source_row", "reason", "detail").rows()
        ],
    }


def _must_have_pairs(run: Run) -> None:
    if run.scored != run.pairs:
        raise DataError(
            f"run {run.name!r} learns from responses, not from pairs: {run.responses} holds them, and 'refscore show' prints it"
        )


@lru_cache(maxsize=4)
def _index(run: Run, stamps: tuple[Stamp, Stamp]) -> pl.DataFrame:
    names = ["pair_id", "split", "topic", *_SUMS, *(f"{side}_ids" for side in _SIDES)]
    table = columns(run.pairs, PAIRS, names).with_columns(
        pl.col(f"{side}_ids").list.len().alias(f"{side}_tokens") for side in _SIDES
    )
    table = table.drop(f"{side}_ids" for side in _SIDES)
    starts = pl.scan_parquet(run.pairs).select(pl.col("prompt").str.slice(0, _START).alias("start")).collect()
    table = table.with_columns(starts["start"])
    if not stamps[1]:
        empty = [pl.lit(None, pl.Float64).alias(f"{side}_last") for side in _SIDES]
        return table.with_columns(*empty, pl.lit(None, pl.Int64).alias("step_last"))
    logps = columns(run.policy_logps, POLICY_LOGPS, ["pair_id", "split", "step", *(f"{side}_logps" for side in _SIDES)])
    last = (
        logps.sort("step")
        .group_by("pair_id", maintain_order=True)
        .last()
        .select(
            "pair_id",
            pl.col("step").alias("step_last"),
            *(pl.col(f"{side}_logps").alias(f"{side}_last") for side in _SIDES),
        )
    )
    return table.join(last, on="pair_id", how="left", maintain_order="left")


def _shown(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "pair_id": row["pair_id"],
        "source": visible(row["source"] or ""),
        "source_row": row["source_row"],
        "prompt": visible(row["prompt"]),
        "texts": [visible(row[side]) for side in _SIDES],
        "parts": differing(row["chosen"], row["rejected"]),
        "pieces": [[visible(piece) for piece in pieces(run, row[f"{side}_ids"])] for side in _SIDES],
        "logps": [short(row[f"ref_{side}_token_logps"]) for side in _SIDES],
    }
