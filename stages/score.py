"""`refscore score DATA --out FILE`: log-probabilities of any responses under the reference."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import SCORED, TOP_SCORED
from pipeline.artifacts.tables import parquet_writer
from pipeline.config.experiment import Config
from pipeline.errors import CheckError, ConfigError
from pipeline.precompute.responses import RowScorer
from pipeline.precompute.top_tokens import TopScorer
from pipeline.progress import duration
from stages import console

# rows between two lines about them
_SAID_EVERY = 2048


def main(data: Path, out: Path, config: Config, top_k: int | None = None) -> None:
    """Score every row of `data` and write SCORED's columns to `out`, in order; with `top_k` TOP_SCORED's."""
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: a file ending in .parquet is written")
    if top_k is not None:
        _likeliest(data, out, config, top_k)
        return
    started = time.monotonic()
    rows, nats, tokens = 0, 0.0, 0
    with RowScorer(config, console.working) as scorer, durable.replacing(out) as temporary:
        about = {"reference_id": scorer.identity.reference_id, "dtype": scorer.identity.numerics.dtype}
        with parquet_writer(temporary, SCORED, about) as writer:
            for table in scorer.tables(data):
                writer.write_table(table)
                rows += len(table)
                nats += sum(value for value in table["logp"].to_pylist() if value is not None)
                tokens += sum(len(ids) for ids in table["response_ids"].to_pylist() if ids is not None)
                adopted = f"{scorer.adopted} adopted, " if scorer.adopted else ""
                console.say(
                    f"{rows} rows: {scorer.hits} hits, {adopted}{scorer.scored} scored, {scorer.dropped} with a problem"
                )
    for by, count in scorer.computed_by.items():
        console.say(f"adopted   {count} of these sequences were computed by {by[:12]}, which was adopted")
    mean = f", {nats / tokens:.4f} nats per token" if tokens else ""
    _must_be_finite(scorer.not_finite, out)
    console.say(f"scores    {out}  ({tokens} response tokens{mean}, {duration(time.monotonic() - started)})")


def _likeliest(data: Path, out: Path, config: Config, top_k: int) -> None:
    started = time.monotonic()
    with TopScorer(config, top_k) as scorer, durable.replacing(out) as temporary:
        about = {
            "reference_id": scorer.identity.reference_id,
            "dtype": scorer.identity.numerics.dtype,
            "top_k": top_k,
        }
        with parquet_writer(temporary, TOP_SCORED, about) as writer:
            said = 0
            for table in scorer.tables(data):
                writer.write_table(table)
                rows = scorer.scored + scorer.dropped
                # parts are small where K is large
                if rows >= said + _SAID_EVERY:
                    said = rows
                    console.say(f"{rows} rows: {scorer.dropped} with a problem")
    took = duration(time.monotonic() - started)
    _must_be_finite(scorer.not_finite, out)
    console.say(
        f"scores    {out}  (the {top_k} likeliest tokens at every position of {scorer.scored} responses, "
        f"{scorer.dropped} rows with a problem, {took})"
    )


def _must_be_finite(left_out: int, out: Path) -> None:
    if left_out:
        raise CheckError(
            f"{left_out} sequences have no finite score under this reference: their rows in {out} say not_finite and hold "
            "no score; all other rows are whole"
        )
