"""Any responses scored under the reference, through the store: for KL estimates, judges, rejection sampling.

Rows stream: a part is tokenised, what the store lacks of it is scored and published, and its scores are read back from the
store. A row that cannot be scored keeps its place, with its problem instead of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import SCORED
from pipeline.config.experiment import Config
from pipeline.engines.growing import Growing
from pipeline.engines.protocol import Request, must_compute
from pipeline.engines.quarantine import score_each
from pipeline.engines.reference import open_reference
from pipeline.errors import DataError
from pipeline.hardware import circumstances
from pipeline.models.configuration import position_limit
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.formats import one_response
from pipeline.pairs.messages import RowProblem
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.rows import open_rows
from pipeline.pairs.splits import prompt_text
from pipeline.precompute.score import check_scores
from pipeline.store.identity import ReferenceIdentity, score_key
from pipeline.store.store import Store

_PART = 8192


class RowScorer:
    """Scores the rows of files with the columns prompt and response, in nats, through the store; a context manager.

    The engine starts with the first sequence that the store lacks, and stops on leaving the context.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._reference = reference = open_reference(config.reference)
        # said before any row is read: new responses have no score that was imported
        must_compute(reference.numerics)
        self._positions = position_limit(reference.paths.base)
        self._encoder = Encoder(config.data, reference.tokenizer, self._positions)
        self.identity: ReferenceIdentity = reference.identity
        self._store = Store(config.reference.store, self.identity)
        self._engine = Growing(reference, config.data.max_length)
        self._quarantined: dict[bytes, str] = {}
        self.hits = self.scored = self.dropped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def tables(self, source: Path) -> Iterator[pa.Table]:
        """SCORED's rows of `source`, part by part, in order. Raises DataError if the columns are not there."""
        rows, _ = open_rows(str(source), self._config.data)
        numbered = enumerate(rows())
        while part := list(islice(numbered, _PART)):
            yield self._part(str(source), part)

    def _part(self, source: str, part: list[tuple[int, Row]]) -> pa.Table:
        items = [preference_of(source, number, row) for number, row in part]
        encoded = list(self._encoder.chosen(items))
        requests = [
            None if isinstance(encoding, Dropped) else Request(encoding.prompt_ids, encoding.responses[0])
            for encoding in encoded
        ]
        keys = [
            None if request is None else score_key(self.identity.reference_id, request.prompt_ids, request.response_ids)
            for request in requests
        ]
        wanted_keys = pa.array([key for key in keys if key is not None], pa.binary(32))
        lookup = self._store.lookup(wanted_keys)
        self.hits += len(lookup.held)
        if missing := wanted_keys.take(pa.array(lookup.missing)).to_pylist():
            self._score(dict(zip(keys, requests, strict=True)), missing)
            lookup = self._store.lookup(wanted_keys)
        scores = {row["key"]: row for row in lookup.found().iter_rows(named=True)}
        rows = [
            scored_row(item, self._or_quarantined(item, encoding, key), scores.get(key))
            for item, encoding, key in zip(items, encoded, keys, strict=True)
        ]
        self.dropped += sum(row["problem"] is not None for row in rows)
        return pa.Table.from_pylist(rows, schema=SCORED)

    @property
    def not_finite(self) -> int:
        """Sequences whose scores are not finite, so far."""
        return len(self._quarantined)

    def _or_quarantined(
        self, item: Preference | Dropped, encoded: Encoded | Dropped, key: bytes | None
    ) -> Encoded | Dropped:
        if key in self._quarantined:
            return Dropped(item.source, item.row, "not_finite", self._quarantined[key])
        return encoded

    def _score(self, requests: dict[bytes | None, Request | None], missing: list[bytes]) -> None:
        asked = [(key, request) for key in missing if (request := requests[key]) is not None]
        asked.sort(key=lambda item: (list(item[1].prompt_ids), -len(item[1])))
        sequences = [request for _, request in asked]
        rows, quarantined = check_scores([key for key, _ in asked], sequences, score_each(self._engine, sequences))
        if rows:
            self._store.publish(rows, circumstances())
        self.scored += len(rows)
        self._quarantined |= quarantined


def preference_of(source: str, number: int, row: Row) -> Preference | Dropped:
    """A row as a preference whose chosen response is the response, and whose rejected one is empty."""
    try:
        prompt, response = one_response(row)
    except RowProblem as problem:
        return Dropped(source, number, problem.reason, problem.detail)
    return Preference(source, number, prompt, response, "")


def _without_scores(dropped: Dropped, prompt: str | None, response: str | None) -> Row:
    nothing = dict.fromkeys(("prompt_ids", "response_ids", "logps", "logp"))
    texts = {"prompt": prompt, "response": response}
    return {"source_row": dropped.row, **texts, **nothing, "problem": f"{dropped.reason} {dropped.detail}".strip()}


def scored_row(item: Preference | Dropped, encoded: Encoded | Dropped, score: dict[str, Any] | None) -> Row:
    """A row of SCORED: with its scores, or with its problem. Raises DataError if the store has no whole score of it."""
    if isinstance(item, Dropped):
        return _without_scores(item, None, None)
    if isinstance(encoded, Dropped):
        return _without_scores(encoded, prompt_text(item.prompt), item.chosen)
    if score is None or len(score["logps"]) != len(encoded.responses[0]):
        raise DataError(f"row {item.row} has no whole score in the store after scoring: run 'refscore store verify'")
    return {
        "source_row": item.row,
        "prompt": prompt_text(item.prompt),
        "response": item.chosen,
        "prompt_ids": encoded.prompt_ids,
        "response_ids": encoded.responses[0],
        "logps": np.asarray(score["logps"], np.float32),
        "logp": score["logp"],
        "problem": None,
    }
