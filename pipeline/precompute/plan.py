"""What an experiment needs of its reference, and what the store lacks of it.

Pairs stream from their sources to a working file and from there to the engine (`pipeline.precompute.score`) and to
pairs.parquet (`pipeline.precompute.join`): memory holds a few numbers per pair, never the pairs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts.tables import arrays_of
from pipeline.config.experiment import Config
from pipeline.config.losses import sums_do_not_do
from pipeline.engines.protocol import Request
from pipeline.engines.reference import OpenedReference, open_reference
from pipeline.errors import ConfigError
from pipeline.hardware import return_freed_memory
from pipeline.models.configuration import position_limit
from pipeline.models.load import chat_template_digest, vocabulary_digest
from pipeline.pairs.splits import PairStream
from pipeline.pairs.table import PairTable, write_pairs
from pipeline.store.identity import IMPORTED, ReferenceIdentity, score_key
from pipeline.store.store import Store


@dataclass(frozen=True)
class Plan:
    """What an experiment needs of its reference, and what the store lacks of it.

    `keys` has two entries per pair, chosen then rejected, of which `sequences` differ; `missing` are positions in it,
    ascending, one for each absent key. `held_as_sums`: sequences of which a sum was imported, and no values per token.
    """

    reference: OpenedReference
    pairs: PairTable
    store: Store
    keys: pa.FixedSizeBinaryArray
    sequences: int
    missing: np.ndarray
    held_as_sums: int
    vocabulary: str
    template: str

    @property
    def identity(self) -> ReferenceIdentity:
        """What names the reference's scores."""
        return self.reference.identity

    @property
    def imported(self) -> bool:
        """Whether the scores are others', so that none can be computed."""
        return self.identity.numerics.engine == IMPORTED

    @property
    def missing_tokens(self) -> int:
        """Tokens of what is missing, prompt included."""
        return int(self.pairs.lengths(self.missing).sum(dtype=np.int64))

    @property
    def longest_missing(self) -> int:
        """Tokens of the longest sequence that is missing."""
        return int(self.pairs.lengths(self.missing).max(initial=0))

    def lines(self, *, scored: bool = True) -> list[str]:
        """Rows, drops, hits, misses and tokens, for people; not `scored`: rows and drops."""
        lines = []
        pairs = self.pairs
        for name, format_name in pairs.formats.items():
            lines.append(f"data      {name}: {format_name}")
        splits = ", ".join(f"{pairs.splits.get(split, 0)} {split}" for split in ("train", "eval"))
        lines.append(f"rows      {len(pairs) + pairs.dropped} read, {len(pairs)} pairs: {splits}")
        if pairs.cut_off:
            lines.append(f"cut off   {pairs.cut_off} of {2 * len(pairs)} responses, which are given no end token")
        for reason, drop in pairs.drops.items():
            detail = f": {drop.first.detail}" if drop.first.detail else ""
            lines.append(f"dropped   {drop.count} x {reason} (first: {drop.first.source} row {drop.first.row}{detail})")
        if not scored:
            return lines
        lines.append(f"reference {self.identity.reference_id[:12]}  {self.identity.numerics.words}")
        known = self.sequences - len(self.missing)
        if self.imported:
            sums = f", {self.held_as_sums} by their sum alone" if self.held_as_sums else ""
            lines.append(f"store     {self.sequences} sequences: {known} imported{sums}, {len(self.missing)} missing")
        else:
            lines.append(
                f"store     {self.sequences} sequences: {known} hits, {len(self.missing)} misses, "
                f"{self.missing_tokens} tokens to score"
            )
        return lines

    def not_imported(self) -> str:
        """What to do about sequences without a score, if scores are imported, in a sentence."""
        by, first = self.identity.numerics.imported_by, self.row(int(self.missing[0]) // 2)
        return (
            f"{len(self.missing)} of {self.sequences} sequences have no score imported by {by!r} (first: {first['source']} row "
            f"{first['source_row']}): import them with 'refscore import', the same configuration and --by, or leave their rows "
            "out of the data, or compute all with reference.engine=vllm and no reference.imported_by. Scores are found under "
            "the same weights, dtype and token ids alone: 'refscore store explain' says what differs"
        )

    def row(self, number: int) -> dict[str, Any]:
        """A pair under its names in pairs.parquet."""
        return self.pairs.row(number)

    def request(self, position: int) -> Request:
        """The sequence whose key stands at `position` of `keys`."""
        pair = self.row(position // 2)
        return Request(pair["prompt_ids"], pair["rejected_ids" if position % 2 else "chosen_ids"])


def make_plan(config: Config, reference: OpenedReference | None = None) -> Plan:
    """Read the data, tokenise, and ask the store; loads no model.

    `reference`: `config.reference`, if it was opened before. Raises DataError if the data cannot be read or gives no pair,
    ConfigError if the reference or its tokenizer cannot be used, or if the loss weighs tokens of which only sums were imported.
    """
    reference = reference or open_reference(config.reference)
    parts: list[pa.FixedSizeBinaryArray] = []
    pairs = write_pairs(
        config.data,
        PairStream(config.data, reference.tokenizer, position_limit(reference.paths.base)),
        lambda table: parts.append(keys_of(reference.identity.reference_id, table)),
    )
    store = Store(config.reference.store, reference.identity)
    keys = pa.concat_arrays(parts)
    parts.clear()
    lookup = store.lookup(keys)
    plan = Plan(
        reference=reference,
        pairs=pairs,
        store=store,
        keys=keys,
        sequences=len(lookup.missing) + len(lookup.held),
        missing=lookup.missing,
        held_as_sums=len(lookup.held_as_sums),
        vocabulary=vocabulary_digest(reference.tokenizer),
        template=chat_template_digest(reference.tokenizer),
    )
    if plan.held_as_sums and config.train.objective == "preference" and config.train.ld_alpha is not None:
        raise ConfigError(sums_do_not_do(f"{plan.held_as_sums} of {plan.sequences} imported scores"))
    # what reading has left behind would stand beside the engine
    del lookup
    return_freed_memory()
    return plan


def keys_of(reference_id: str, pairs: pa.Table) -> pa.FixedSizeBinaryArray:
    """Keys of the pairs' sequences, chosen then rejected of each pair."""
    columns = [arrays_of(pairs, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    keys = [
        score_key(reference_id, prompt, response)
        for prompt, *responses in zip(*columns, strict=True)
        for response in responses
    ]
    return pa.array(keys, pa.binary(32))


def part_of(plan: Plan, number: int, parts: int) -> Plan:
    """The plan with what is missing in one of `parts` parts: decided by the prompt's ids, so siblings are in one part."""
    kept: list[int] = []
    for first, table in plan.pairs.groups(["prompt_ids"]):
        low, high = np.searchsorted(plan.missing, [2 * first, 2 * (first + len(table))])
        prompts = arrays_of(table, "prompt_ids") if low < high else []
        kept += [
            position
            for position in plan.missing[low:high].tolist()
            if zlib.crc32(prompts[position // 2 - first].tobytes()) % parts == number
        ]
    return replace(plan, missing=np.asarray(kept, dtype=np.int64))
