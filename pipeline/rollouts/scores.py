"""Log-probabilities of samples under a model, through the store: what it lacks is scored and published shard by shard.

The samples of a prompt go to the engine together, which reads the prompt once for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.artifacts.runs import Run
from pipeline.artifacts.tables import arrays_of
from pipeline.engines.protocol import Request, Scorer
from pipeline.engines.quarantine import score_each
from pipeline.engines.reference import OpenedReference
from pipeline.errors import CheckError, RefscoreError
from pipeline.hardware import circumstances, return_freed_memory
from pipeline.precompute.launch import score_windows
from pipeline.precompute.plan import Window
from pipeline.precompute.score import check_scores, table_of
from pipeline.progress import Listener, duration
from pipeline.rollouts.costs import Costs
from pipeline.rollouts.samples import Shard
from pipeline.store.adoption import held_by_adopted, serve_from_adopted
from pipeline.store.identity import score_key
from pipeline.store.store import Store


@dataclass
class Scores:
    """A model's scores of the samples of some shards. `quarantined`: keys of those that are not finite, and why."""

    model: OpenedReference
    shards: Sequence[Shard]
    run: Run
    quarantined: dict[bytes, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._store = Store(self.model.config.store, self.model.identity)

    @property
    def reference_id(self) -> str:
        """What names the model and its numerics in the store."""
        return self.model.identity.reference_id

    def make(self, whose: str, costs: Costs, listener: Listener) -> None:
        """Score what the store lacks; starts no engine if that is nothing. `whose`: the model's part here, for people.

        Raises RefscoreError if the store cannot be written, CheckError for scores that cannot be true.
        """
        missing = self.missing()
        if missing:
            if problem := self._store.why_not_writable():
                raise RefscoreError(
                    f"samples must be scored, but the store cannot be written ({problem}): put a directory of your own first, "
                    "--set 'reference.store=[data/store, THIS ONE]'"
                )
            self.register()
            missing = self._not_adopted(missing, listener)
        if not missing:
            listener.say(f"scores    of {whose}: every sample is in the store; no engine is started")
            return
        requests = [request for asked in missing.values() for request in asked.values()]
        if self.model.config.in_actors:
            self._make_in_actors(missing, costs, listener)
            return
        started = time.monotonic()
        listener.say(f"starting {self.model.config.engine} for {len(requests)} samples under {whose} ...")
        with (
            listener.progress("scoring", len(requests)) as ticker,
            self.model.start(max(map(len, requests))) as scorer,
        ):
            listener.say(f"engine ready after {duration(time.monotonic() - started)}")
            ticker.started = time.monotonic()
            for shard, asked in missing.items():
                self._publish(asked, scorer)
                tokens = sum(map(len, asked.values()))
                costs.add("score", f"{self.reference_id}/{shard}", time.monotonic() - started, tokens)
                ticker.advance_tokens(len(asked), tokens)
                started = time.monotonic()
        self._store.finish()

    def _make_in_actors(self, missing: dict[str, dict[bytes, Request]], costs: Costs, listener: Listener) -> None:
        """Score in actors of Ray; what that took is shared out among the shards by their tokens."""
        windows = [Window(table_of(asked), number / len(missing)) for number, asked in enumerate(missing.values(), 1)]
        started = time.monotonic()
        outcome = score_windows(self.model, windows, listener=listener)
        seconds = time.monotonic() - started
        self.quarantined |= outcome.quarantined
        tokens = {shard: sum(map(len, asked.values())) for shard, asked in missing.items()}
        for shard, of_shard in tokens.items():
            costs.add("score", f"{self.reference_id}/{shard}", seconds * of_shard / sum(tokens.values()), of_shard)

    def register(self) -> None:
        """Leave word in the store that the run uses these scores."""
        self._store.register(self.run.directory)

    def costs_of(self) -> list[str]:
        """The names under which `Costs` has what scoring took."""
        return [f"{self.reference_id}/{shard.key}" for shard in self.shards]

    def by_shard(self) -> Iterator[dict[bytes, np.ndarray]]:
        """For each shard the values per token of its samples by key, but of those that are quarantined or have no token.

        Raises CheckError if the store has one no more.
        """
        keys = [self.keys(shard) for shard in self.shards]
        # one question for all, as each reads the keys of the whole store
        lookup = self._store.lookup(pa.array([key for of_shard in keys for key in of_shard.values()], pa.binary(32)))
        first = 0
        for of_shard in keys:
            positions = np.arange(first, first + len(of_shard))
            first += len(of_shard)
            found: dict[bytes, np.ndarray] = {}
            for _, table in lookup.rows(positions):
                found |= dict(zip(table["key"].to_pylist(), arrays_of(table, "logps"), strict=True))
            if absent := set(of_shard.values()) - found.keys() - self.quarantined.keys():
                raise CheckError(
                    f"{len(absent)} scores are missing from the store after scoring: a shard was set aside or removed meanwhile. "
                    "Run 'refscore rollout' again, which scores what is missing"
                )
            yield found

    def keys(self, shard: Shard) -> dict[tuple[str, int], bytes]:
        """The keys of the shard's samples that have a token, by prompt_id and number."""
        return {name: self._key(request) for name, request in requests_of(shard, self.run)}

    def _key(self, request: Request) -> bytes:
        return score_key(self.reference_id, request.prompt_ids, request.response_ids)

    def missing(self) -> dict[str, dict[bytes, Request]]:
        """By shard, what the store lacks of it; shards that lack nothing are left out."""
        keys = [key for shard in self.shards for key in self.keys(shard).values()]
        lookup = self._store.lookup(pa.array(keys, pa.binary(32)))
        absent = {keys[position] for position in lookup.missing}
        missing: dict[str, dict[bytes, Request]] = {}
        for shard in self.shards if absent else []:
            requests = {self._key(request): request for _, request in requests_of(shard, self.run)}
            if asked := {key: request for key, request in requests.items() if key in absent}:
                missing[shard.key] = asked
                absent -= asked.keys()
        return missing

    def foreseen(self) -> tuple[list[Request], dict[str, int]]:
        """What would have to be scored, and how many sequences the store would have from adopted references, by their ids."""
        requests = [request for asked in self.missing().values() for request in asked.values()]

        def keys_under(reference_id: str, positions: np.ndarray) -> pa.FixedSizeBinaryArray:
            asked = (requests[position] for position in positions.tolist())
            return pa.array([score_key(reference_id, one.prompt_ids, one.response_ids) for one in asked], pa.binary(32))

        held = held_by_adopted(self._store, np.arange(len(requests)), keys_under)
        adopted = {position for positions in held.values() for position in positions.tolist()}
        left = [request for position, request in enumerate(requests) if position not in adopted]
        return left, {by: len(positions) for by, positions in held.items()}

    def computed_by(self) -> dict[str, int]:
        """Of how many sequences adopted references computed the scores, by their ids."""
        keys = [key for shard in self.shards for key in self.keys(shard).values()]
        held = self._store.lookup(pa.array(keys, pa.binary(32))).held_from_adopted()
        return {by: len(positions) for by, positions in held.items()}

    def _not_adopted(
        self, missing: dict[str, dict[bytes, Request]], listener: Listener
    ) -> dict[str, dict[bytes, Request]]:
        """What is missing still when adopted references have given what they hold of it."""
        left: dict[str, dict[bytes, Request]] = {}
        adopted = 0
        for shard, asked in missing.items():
            keys = serve_from_adopted(self._store, table_of(asked))["key"].to_pylist()
            adopted += len(asked) - len(keys)
            if keys:
                left[shard] = {key: asked[key] for key in keys}
        if adopted:
            listener.say(f"adopted   {adopted} scores that an earlier reference computed")
        return left

    def _publish(self, asked: dict[bytes, Request], scorer: Scorer) -> None:
        requests = list(asked.values())
        rows, not_finite = check_scores(list(asked), requests, score_each(scorer, requests))
        self.model.must_be_unchanged()
        if rows:
            self._store.publish(rows, circumstances())
        self.quarantined |= not_finite
        # activations of ever other sizes leave holes that glibc keeps
        return_freed_memory()


def requests_of(shard: Shard, run: Run) -> Iterator[tuple[tuple[str, int], Request]]:
    """The shard's samples that have a token as sequences, each with its prompt_id and number."""
    prompts = {prompt.prompt_id: prompt for prompt in shard.prompts}
    for row in shard.samples(run).select(["prompt_id", "sample", "response_ids"]).to_pylist():
        if row["response_ids"]:
            yield (row["prompt_id"], row["sample"]), Request(prompts[row["prompt_id"]].ids, row["response_ids"])
