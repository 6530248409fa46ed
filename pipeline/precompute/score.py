"""Scoring what a plan misses, and publishing it to the store shard by shard.

Everything goes through the store, and pairs.parquet is filled from it alone: scoring that was interrupted goes on after
the last shard that was published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pipeline.artifacts.tables import arrays_of
from pipeline.engines.protocol import Request, Scorer
from pipeline.engines.quarantine import score_each, why_quarantined
from pipeline.errors import CheckError
from pipeline.hardware import circumstances, return_freed_memory
from pipeline.precompute.plan import Plan
from pipeline.store.shard import logps_problem
from pipeline.store.store import Scored

# sequences that are sorted together: enough for full shards of similar lengths, few enough to stay small in memory
_WINDOW = 16_384


def score_missing(plan: Plan, scorer: Scorer, on_shard: Callable[[int, int], None]) -> dict[bytes, str]:
    """Score what `plan` misses and publish it shard by shard; `on_shard(sequences, tokens)` after each.

    Returns the keys of sequences whose scores are not finite, and why: they are not published. Raises CheckError for
    scores that cannot be true, or when the weights change meanwhile.
    """
    requested, tokens = plan.reference.config.tokens_per_shard, default_tokens_per_shard(plan)
    # the first default shard is small: numbers to look at, and proof that all is well, after seconds
    shards = shards_of(plan, requested) if requested else shards_of(plan, tokens, tokens // 8)
    quarantined: dict[bytes, str] = {}
    for shard in shards:
        requests = [request for _, request in shard]
        keys = [plan.keys[position].as_py() for position, _ in shard]
        quarantined |= publish_scores(plan, keys, requests, score_each(scorer, requests))
        # activations of ever other sizes leave holes that glibc keeps
        return_freed_memory()
        on_shard(len(shard), sum(map(len, requests)))
    return quarantined


def publish_scores(
    plan: Plan, keys: list[bytes], requests: list[Request], scores: list[np.ndarray]
) -> dict[bytes, str]:
    """Publish one shard; returns the keys of what is not finite, and why.

    Raises CheckError for scores that cannot be true, or if the weights are no longer the plan's.
    """
    rows, quarantined = check_scores(keys, requests, scores)
    plan.reference.must_be_unchanged()
    if rows:
        plan.store.publish(rows, circumstances())
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


def shards_of(plan: Plan, tokens: int, first: int | None = None) -> Iterator[list[tuple[int, Request]]]:
    """Missing positions and their sequences in groups of about `tokens` tokens, the first of about `first`.

    Within a window of the data responses to one prompt stand together, and prompts with the longest sequence come first, so
    that a lack of memory shows at once.
    """
    budget = first or tokens
    for window in _windows(plan):
        prompts = {position: prompt.tobytes() for position, (prompt, _) in window.items()}
        longest: dict[bytes, int] = {}
        for position, (prompt, response) in window.items():
            longest[prompts[position]] = max(longest.get(prompts[position], 0), len(prompt) + len(response))
        shard: list[tuple[int, Request]] = []
        filled = 0
        for position in sorted(window, key=lambda at: (-longest[prompts[at]], prompts[at], at)):
            prompt, response = window[position]
            request = Request(prompt.tolist(), response.tolist())
            if shard and filled + len(request) > budget:
                yield shard
                shard, filled, budget = [], 0, tokens
            shard.append((position, request))
            filled += len(request)
        if shard:
            yield shard


def default_tokens_per_shard(plan: Plan) -> int:
    """About half a minute of scoring, so that a kill loses little."""
    return 2**14 if plan.reference.numerics.device == "cpu" else 2**20


def _windows(plan: Plan) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Missing positions with prompt and response ids, in the order of the data."""
    window: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    sides = len(plan.sides)
    for first, table in plan.pairs.groups(plan.pairs.ids):
        low, high = np.searchsorted(plan.missing, [sides * first, sides * (first + len(table))])
        if low == high:
            continue
        prompts, *responses = (arrays_of(table, name) for name in plan.pairs.ids)
        for position in plan.missing[low:high].tolist():
            row, side = divmod(position, sides)
            window[position] = prompts[row - first], responses[side][row - first]
        if len(window) >= _WINDOW:
            yield window
            window = {}
    if window:
        yield window
