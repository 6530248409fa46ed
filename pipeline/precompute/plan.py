"""Stage one without its command line: what must be scored, and scoring it. `pipeline.precompute.join` brings scores and pairs
together.

Everything goes through the store: planning asks it what is there, scoring publishes shards to it, and pairs.parquet is
filled from it alone, so an interrupted run goes on after its last published shard. Pairs stream from their sources to a
working file and from there to the engine: memory holds a few numbers a pair, never the pairs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.engines.protocol import Request, Scorer, numerics_of
from pipeline.engines.quarantine import score_each, why_quarantined
from pipeline.errors import CheckError
from pipeline.hardware import circumstances, device_kind, return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import ReferencePaths, locate_reference
from pipeline.pairs.stream import PairStream
from pipeline.pairs.table import PairTable, write_pairs
from pipeline.store.identity import ReferenceIdentity, identify, key_of
from pipeline.store.shard import logps_problem
from pipeline.store.store import Scored, Store

# sequences that are sorted together: enough for full shards of similar lengths, few enough to stay small in memory
_WINDOW = 16_384


@dataclass(frozen=True)
class Plan:
    """What an experiment needs of its reference, and what the store lacks of it.

    `keys` has two entries a pair, chosen then rejected, of which `sequences` differ; `missing` are positions in it,
    ascending, one for each absent key.
    """

    paths: ReferencePaths
    pairs: PairTable
    identity: ReferenceIdentity
    store: Store
    keys: pa.FixedSizeBinaryArray
    sequences: int
    missing: np.ndarray
    vocabulary: str
    template: str

    @property
    def missing_tokens(self) -> int:
        """Tokens of what is missing, prompt included."""
        return int(self.pairs.lengths(self.missing).sum(dtype=np.int64))

    @property
    def longest_missing(self) -> int:
        """Tokens of the longest sequence that is missing."""
        return int(self.pairs.lengths(self.missing).max(initial=0))

    def row(self, number: int) -> dict[str, Any]:
        """A pair under its names in pairs.parquet."""
        return self.pairs.row(number)

    def request(self, position: int) -> Request:
        """The sequence whose key stands at `position` of `keys`."""
        pair = self.row(position // 2)
        return Request(pair["prompt_ids"], pair["rejected_ids" if position % 2 else "chosen_ids"])


def make_plan(config: Config) -> Plan:
    """Read the data, tokenise, and ask the store; loads no model."""
    reference = config.reference
    numerics = numerics_of(reference)
    paths = locate_reference(reference)
    tokenizer = load_tokenizer(paths.merged, reference)
    identity = identify(paths.base, numerics, paths.adapter, trusts_code=reference.trust_remote_code)
    parts: list[pa.FixedSizeBinaryArray] = []
    pairs = write_pairs(
        config.data,
        PairStream(config.data, tokenizer, position_limit(paths.base)),
        lambda table: parts.append(keys_of(identity.reference_id, table)),
    )
    store = Store(reference.store, identity)
    keys = pa.concat_arrays(parts)
    parts.clear()
    lookup = store.lookup(keys)
    plan = Plan(
        paths=paths,
        pairs=pairs,
        identity=identity,
        store=store,
        keys=keys,
        sequences=len(lookup.missing) + len(lookup.held),
        missing=lookup.missing,
        vocabulary=vocabulary_digest(tokenizer),
        template=chat_template_digest(tokenizer),
    )
    # what reading has left behind would stand beside the engine
    del lookup
    return_freed_memory()
    return plan


def keys_of(reference_id: str, pairs: pa.Table) -> pa.FixedSizeBinaryArray:
    """Keys of the pairs' sequences, chosen then rejected of each pair."""
    columns = [_lists(pairs, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    found = [
        key_of(reference_id, prompt, response)
        for prompt, *responses in zip(*columns, strict=True)
        for response in responses
    ]
    return pa.array(found, pa.binary(32))


def part_of(plan: Plan, number: int, parts: int) -> Plan:
    """The plan with what is missing in one of `parts` parts: decided by the prompt's ids, so siblings are in one part."""
    kept: list[int] = []
    for first, table in plan.pairs.groups(["prompt_ids"]):
        low, high = np.searchsorted(plan.missing, [2 * first, 2 * (first + len(table))])
        prompts = _lists(table, "prompt_ids") if low < high else []
        kept += [
            position
            for position in plan.missing[low:high].tolist()
            if zlib.crc32(prompts[position // 2 - first].tobytes()) % parts == number
        ]
    return replace(plan, missing=np.asarray(kept, dtype=np.int64))


def score_missing(
    plan: Plan, reference: ReferenceConfig, scorer: Scorer, on_shard: Callable[[int, int], None]
) -> dict[bytes, str]:
    """Score what `plan` misses and publish it shard by shard; `on_shard(sequences, tokens)` after each.

    Returns the keys of sequences whose scores are not finite, and why: they are not published. Raises CheckError for
    scores that cannot be true, or when the weights change meanwhile.
    """
    tokens = default_tokens_per_shard()
    # the first default shard is small: numbers to look at, and proof that all is well, after seconds
    shards = (
        shards_of(plan, reference.tokens_per_shard)
        if reference.tokens_per_shard
        else shards_of(plan, tokens, tokens // 8)
    )
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
    now = identify(
        plan.paths.base, plan.identity.numerics, plan.paths.adapter, trusts_code=bool(plan.identity.model.code)
    )
    if now != plan.identity:
        raise CheckError(
            f"the weights in {plan.paths.base} changed while they were scored: nothing of this shard is kept"
        )
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


def default_tokens_per_shard() -> int:
    """About half a minute of scoring, so that a kill loses little."""
    return 2**14 if device_kind() == "cpu" else 2**20


def _windows(plan: Plan) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Missing positions with prompt and response ids, in the order of the data."""
    window: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for first, table in plan.pairs.groups(["prompt_ids", "chosen_ids", "rejected_ids"]):
        low, high = np.searchsorted(plan.missing, [2 * first, 2 * (first + len(table))])
        if low == high:
            continue
        prompts, *sides = (_lists(table, name) for name in table.column_names)
        for position in plan.missing[low:high].tolist():
            row = position // 2 - first
            window[position] = prompts[row], sides[position % 2][row]
        if len(window) >= _WINDOW:
            yield window
            window = {}
    if window:
        yield window


def _lists(table: pa.Table, column: str) -> list[np.ndarray]:
    return [row.values.to_numpy(zero_copy_only=False) for row in table[column]]
