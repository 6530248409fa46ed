"""Stage one without its command line: what must be scored, scoring it, and joining scores to pairs.

Everything goes through the store: planning asks it what is there, scoring publishes shards to it, and pairs.parquet is
filled from it alone, so an interrupted run goes on after its last published shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.config import Config, ReferenceConfig, digest
from pipeline.errors import CheckError
from pipeline.hardware import device_kind
from pipeline.identity import ReferenceIdentity, identify, key_of
from pipeline.models import ReferencePaths, load_tokenizer, locate_reference
from pipeline.pairs import Pair, PairSet, build_pairs, prompt_text, source_digests
from pipeline.schema import PAIRS, read_about
from pipeline.scoring import Request, Scorer, numerics_of
from pipeline.store import Scored, Store, logps_problem
from pipeline.vocabulary import template_digest, vocabulary_digest


@dataclass(frozen=True)
class Plan:
    """What an experiment needs of its reference, and what the store lacks of it.

    `keys` has two entries a pair, chosen then rejected; `missing` are positions in it, one for each absent key.
    """

    paths: ReferencePaths
    pairs: PairSet
    identity: ReferenceIdentity
    store: Store
    keys: pl.Series
    missing: list[int]
    vocabulary: str
    template: str

    @property
    def sequences(self) -> int:
        """Distinct sequences of the data."""
        return self.keys.n_unique()

    @property
    def missing_tokens(self) -> int:
        """Tokens that scoring has to read, prompt included."""
        return sum(len(self.request(position)) for position in self.missing)

    def row(self, number: int) -> dict[str, Any]:
        """Texts and tokens of a pair under their names in pairs.parquet."""
        pair = self.pairs.pairs[number]
        return {
            "prompt": prompt_text(pair.preference.prompt),
            "chosen": pair.preference.chosen,
            "rejected": pair.preference.rejected,
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids,
        }

    def request(self, position: int) -> Request:
        """The sequence whose key stands at `position` of `keys`."""
        pair = self.pairs.pairs[position // 2]
        return Request(pair.prompt_ids, pair.rejected_ids if position % 2 else pair.chosen_ids)


def make_plan(config: Config) -> Plan:
    """Read the data, tokenise, and ask the store; loads no model."""
    reference = config.reference
    numerics = numerics_of(reference)
    paths = locate_reference(reference)
    tokenizer = load_tokenizer(paths.merged, reference)
    pairs = build_pairs(config.data, tokenizer)
    identity = identify(paths.base, numerics, paths.adapter)
    store = Store(reference.store, identity)
    keys = keys_of(identity.reference_id, pairs.pairs)
    return Plan(
        paths=paths,
        pairs=pairs,
        identity=identity,
        store=store,
        keys=keys,
        missing=first_positions(keys, store.missing(keys)),
        vocabulary=vocabulary_digest(tokenizer),
        template=template_digest(tokenizer),
    )


def keys_of(reference_id: str, pairs: list[Pair]) -> pl.Series:
    """Keys of the pairs' sequences, chosen then rejected of each pair, as a Binary series."""
    return pl.Series(
        (
            key_of(reference_id, pair.prompt_ids, response)
            for pair in pairs
            for response in (pair.chosen_ids, pair.rejected_ids)
        ),
        dtype=pl.Binary,
    )


def first_positions(keys: pl.Series, wanted: pl.Series) -> list[int]:
    """Where each of `wanted` first stands in `keys`, ascending."""
    positions = pl.DataFrame({"key": keys}).with_row_index("position").unique("key", keep="first", maintain_order=True)
    return positions.join(pl.DataFrame({"key": wanted}), on="key", how="semi", maintain_order="left")[
        "position"
    ].to_list()


def score_missing(plan: Plan, reference: ReferenceConfig, scorer: Scorer, on_shard: Callable[[int, int], None]) -> None:
    """Score what `plan` misses and publish it shard by shard; `on_shard(sequences, tokens)` after each.

    Raises CheckError for scores that cannot be true, or when the weights change meanwhile.
    """
    for shard in shards_of(plan, reference.tokens_per_shard or default_tokens_per_shard()):
        requests = [plan.request(position) for position in shard]
        rows = []
        for position, request, logps in zip(shard, requests, scorer.score(requests), strict=True):
            if problem := logps_problem(logps, len(request.response_ids)):
                raise CheckError(
                    f"the engine's scores cannot be true: {problem} (prompt of {len(request.prompt_ids)} tokens)"
                )
            rows.append(Scored(plan.keys[position], len(request.prompt_ids), logps))
        if identify(plan.paths.base, plan.identity.numerics, plan.paths.adapter) != plan.identity:
            raise CheckError(
                f"the weights in {plan.paths.base} changed while they were scored: nothing of this shard is kept"
            )
        plan.store.publish(rows)
        on_shard(len(shard), sum(map(len, requests)))


def shards_of(plan: Plan, tokens: int) -> Iterator[list[int]]:
    """Missing positions in groups of about `tokens` tokens: responses to one prompt together, prompts with the longest
    sequence first, so that a lack of memory shows at once.
    """
    prompts = {position: bytes(np.asarray(plan.request(position).prompt_ids, np.int32)) for position in plan.missing}
    longest: dict[bytes, int] = {}
    for position, prompt in prompts.items():
        longest[prompt] = max(longest.get(prompt, 0), len(plan.request(position)))
    shard: list[int] = []
    filled = 0
    for position in sorted(
        plan.missing, key=lambda position: (-longest[prompts[position]], prompts[position], position)
    ):
        length = len(plan.request(position))
        if shard and filled + length > tokens:
            yield shard
            shard, filled = [], 0
        shard.append(position)
        filled += length
    if shard:
        yield shard


def default_tokens_per_shard() -> int:
    """About half a minute of scoring, so that a kill loses little."""
    return 2**14 if device_kind() == "cpu" else 2**20


def join_scores(plan: Plan, *, scored: bool = True) -> pa.Table:
    """pairs.parquet's content: every pair with its scores from the store; not `scored`: with nulls in their place.

    Raises CheckError where a score is not there.
    """
    if not scored:
        return _table_of(plan, dict.fromkeys(name for name in PAIRS.names if name.startswith("ref_")))
    scores = plan.store.found(plan.keys).select("key", "logps", "logp")
    joined = pl.DataFrame({"key": plan.keys}).join(scores, on="key", how="left", maintain_order="left")
    absent = joined["logp"].is_null().arg_true().to_list()
    if absent:
        ids = ", ".join(plan.pairs.pairs[position // 2].pair_id for position in absent[:10])
        raise CheckError(f"{len(absent)} scores are missing from the store after scoring, first of the pairs {ids}")
    # Polars' lists have 64-bit offsets, PAIRS' columns 32-bit ones
    kinds = pa.schema([("logps", PAIRS.field("ref_chosen_logps").type), ("logp", pa.float64())])
    chosen, rejected = (joined.select("logps", "logp")[side::2].to_arrow().cast(kinds) for side in (0, 1))
    _must_cover(plan.pairs.pairs, chosen, rejected)
    return _table_of(
        plan,
        {
            "ref_chosen_logps": chosen["logps"],
            "ref_rejected_logps": rejected["logps"],
            "ref_chosen_logp": chosen["logp"],
            "ref_rejected_logp": rejected["logp"],
        },
    )


def _table_of(plan: Plan, scores: dict[str, object]) -> pa.Table:
    pairs = plan.pairs.pairs
    columns: dict[str, object] = {
        "pair_id": [pair.pair_id for pair in pairs],
        "split": [pair.split for pair in pairs],
        "source": [pair.preference.source for pair in pairs],
        "source_row": [pair.preference.row for pair in pairs],
        "topic": [pair.preference.topic for pair in pairs],
        "prompt": [prompt_text(pair.preference.prompt) for pair in pairs],
        "chosen": [pair.preference.chosen for pair in pairs],
        "rejected": [pair.preference.rejected for pair in pairs],
        "prompt_ids": [pair.prompt_ids for pair in pairs],
        "chosen_ids": [pair.chosen_ids for pair in pairs],
        "rejected_ids": [pair.rejected_ids for pair in pairs],
    }
    nothing = [None] * len(pairs)
    columns |= {name: nothing if values is None else values for name, values in scores.items()}
    return pa.table(columns, schema=PAIRS)


def inputs_digest(config: Config) -> str:
    """Digest of every configuration field that decides pairs.parquet; the data files' bytes are digested apart."""
    reference = config.reference.model_dump(mode="json", include={"model", "revision", "adapter", "engine", "dtype"})
    return digest(config.data, reference)


def is_current(path: Path, config: Config, *, scored: bool = True) -> bool:
    """Whether `path` was made from this configuration and from the bytes that its data files have now, with scores if asked.

    A source that is gone or is no file (a Hub data set) is taken to be unchanged.
    """
    about = read_about(path)
    if not about or about.get("inputs_digest") != inputs_digest(config):
        return False
    if scored and not about.get("scored", True):
        return False
    return all(
        digest in (None, about["source_digests"].get(name)) for name, digest in source_digests(config.data).items()
    )


def about_pairs(plan: Plan, config: Config, *, scored: bool = True) -> dict[str, object]:
    """What pairs.parquet says of itself: enough to tell later whether it still fits its inputs."""
    return {
        "reference_id": plan.identity.reference_id,
        "weights_digest": plan.identity.weights_digest,
        "dtype": plan.identity.numerics.dtype,
        "inputs_digest": inputs_digest(config),
        "source_digests": plan.pairs.digests,
        "vocabulary": plan.vocabulary,
        "template": plan.template,
        "scored": scored,
    }


def _must_cover(pairs: list[Pair], chosen: pa.Table, rejected: pa.Table) -> None:
    for side, table in (("chosen", chosen), ("rejected", rejected)):
        wanted = np.array([len(getattr(pair, f"{side}_ids")) for pair in pairs])
        lengths = pl.from_arrow(table["logps"]).list.len().to_numpy()  # type: ignore[union-attr]  # a Series, as it is a column
        if not np.array_equal(wanted, lengths):
            row = int(np.argmax(wanted != lengths))
            raise CheckError(f"{side} of pair {pairs[row].pair_id} has {wanted[row]} tokens but {lengths[row]} scores")
