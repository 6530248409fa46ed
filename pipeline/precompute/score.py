"""Scoring what the store lacks, window by window as it is planned, and publishing it shard by shard.

Everything goes through the store, and pairs.parquet is filled from it alone: scoring that was interrupted goes on after
the last shard that was published. While a shard is in the engine the next one is prepared and the one before is published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.schemas import MISSING
from pipeline.artifacts.tables import arrays_of
from pipeline.engines.protocol import Request, Scorer
from pipeline.engines.quarantine import score_each, why_quarantined
from pipeline.engines.reference import OpenedReference
from pipeline.errors import CheckError
from pipeline.hardware import circumstances, return_freed_memory
from pipeline.precompute.overlap import overlapped
from pipeline.precompute.plan import Plan, Window, groups_of
from pipeline.store.shard import logps_problem
from pipeline.store.store import Scored, Store

# what is sorted together fills at least so many shards, where windows lack little
_SHARDS_AT_LEAST = 4


@dataclass(frozen=True)
class Target:
    """Whose scores are computed, and the store that takes them."""

    reference: OpenedReference
    store: Store

    def publish(self, shard: pa.Table, scores: list[np.ndarray]) -> dict[bytes, str]:
        """Publish one shard of MISSING's rows; returns the keys of what is not finite, and why.

        Raises CheckError for scores that cannot be true, or if the weights are no longer those of `reference`.
        """
        rows, quarantined = check_scores(shard["key"].to_pylist(), requests_in(shard), scores)
        self.reference.must_be_unchanged()
        if rows:
            self.store.publish(rows, circumstances())
        return quarantined


def target_of(reference: OpenedReference) -> Target:
    """The store of the reference's own configuration."""
    return Target(reference, Store(reference.config.store, reference.identity))


def score_shards(
    target: Target, shards: Iterable[pa.Table], scorer: Scorer, on_shard: Callable[[int, int], None]
) -> dict[bytes, str]:
    """Score and publish tables of MISSING, each as one shard; `on_shard(sequences, tokens)` when one is in the store.

    Returns the keys of sequences whose scores are not finite, and why: they are not published. Raises CheckError for
    scores that cannot be true, or when the weights change meanwhile.
    """
    quarantined: dict[bytes, str] = {}

    def score(shard: pa.Table) -> list[np.ndarray]:
        scores = score_each(scorer, requests_in(shard))
        # activations of ever other sizes leave holes that glibc keeps
        return_freed_memory()
        return scores

    def publish(shard: pa.Table, scores: list[np.ndarray]) -> None:
        quarantined.update(target.publish(shard, scores))
        on_shard(len(shard), tokens_in(shard))

    overlapped(shards, score, publish)
    return quarantined


def check_scores(
    keys: list[bytes], requests: list[Request], scores: list[np.ndarray]
) -> tuple[list[Scored], dict[bytes, str]]:
    """Rows for the store, and the keys of scores that are not finite. Raises CheckError for scores that cannot be true."""
    rows: list[Scored] = []
    quarantined: dict[bytes, str] = {}
    for key, request, logps in zip(keys, requests, scores, strict=True):
        if len(logps) == len(request.response_ids) and (why := why_quarantined(logps)):
            quarantined[key] = why
            continue
        if problem := logps_problem(logps, len(request.response_ids)):
            raise CheckError(
                f"the engine's scores cannot be true: {problem} (prompt of {len(request.prompt_ids)} tokens)"
            )
        rows.append(Scored(key, len(request.prompt_ids), logps))
    return rows, quarantined


def shards_of(reference: OpenedReference, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Rows of MISSING, given in any portions, in tables of about `tokens_per_shard` tokens, sorted within a portion or a few."""
    requested, tokens = reference.config.tokens_per_shard, default_tokens_per_shard(reference)
    # the first default shard is small: numbers to look at, and proof that all is well, after seconds
    budget, first = (requested, requested) if requested else (tokens, tokens // 8)
    for table in _worth_sorting(tables, _SHARDS_AT_LEAST * budget):
        for shard in sorted_shards(table, budget, first):
            yield shard
            first = budget


def sorted_shards(table: pa.Table, tokens: int, first: int) -> Iterator[pa.Table]:
    """Rows of MISSING in tables of about `tokens` tokens, the first of about `first`.

    Responses to one prompt stand together, and prompts with the longest sequence come first, so that a lack of memory shows at
    once.
    """
    prompts = [prompt.tobytes() for prompt in arrays_of(table, "prompt_ids")]
    lengths = lengths_in(table).tolist()
    longest: dict[bytes, int] = {}
    for prompt, length in zip(prompts, lengths, strict=True):
        longest[prompt] = max(longest.get(prompt, 0), length)
    order = sorted(range(len(table)), key=lambda row: (-longest[prompts[row]], prompts[row], row))
    shard: list[int] = []
    filled, budget = 0, first
    for row in order:
        if shard and filled + lengths[row] > budget:
            yield table.take(shard)
            shard, filled, budget = [], 0, tokens
        shard.append(row)
        filled += lengths[row]
    if shard:
        yield table.take(shard)


def default_tokens_per_shard(reference: OpenedReference) -> int:
    """About half a minute of scoring, so that a kill loses little."""
    return 2**14 if reference.numerics.device == "cpu" else 2**20


def windows_of(plan: Plan) -> Iterator[Window]:
    """What a whole plan lacks, in windows."""
    done = 0
    for positions, missing in groups_of(plan.pairs, plan.keys, plan.absent):
        done += len(positions)
        yield Window(missing, done / len(plan.absent))


def requests_in(table: pa.Table) -> list[Request]:
    """The sequences of MISSING's rows."""
    columns = (table[name].to_pylist() for name in ("prompt_ids", "response_ids"))
    return [Request(prompt, response) for prompt, response in zip(*columns, strict=True)]


def table_of(requests: Mapping[bytes, Request]) -> pa.Table:
    """Sequences by their keys as MISSING's rows."""
    ids = [[list(getattr(one, name)) for one in requests.values()] for name in ("prompt_ids", "response_ids")]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip([list(requests), *ids], MISSING, strict=True)],
        schema=MISSING,
    )


def lengths_in(table: pa.Table) -> np.ndarray:
    """Tokens of each of MISSING's rows, prompt included."""
    columns = [pc.list_value_length(table[name]).to_numpy() for name in ("prompt_ids", "response_ids")]
    lengths: np.ndarray = columns[0].astype(np.int64) + columns[1]
    return lengths


def tokens_in(table: pa.Table) -> int:
    """Tokens of all of MISSING's rows."""
    return int(lengths_in(table).sum())


def _worth_sorting(tables: Iterable[pa.Table], tokens: int) -> Iterator[pa.Table]:
    """The tables, but small ones together, so that each has at least `tokens` tokens, but for the last."""
    held: list[pa.Table] = []
    filled = 0
    for table in tables:
        held.append(table)
        filled += tokens_in(table)
        if filled >= tokens:
            yield pa.concat_tables(held)
            held, filled = [], 0
    if filled:
        yield pa.concat_tables(held)
