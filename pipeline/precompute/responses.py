"""Any responses scored under the reference, through the store: for KL estimates, judges, rejection sampling.

Rows stream: a part is tokenised, what the store lacks of it is scored and published, and its scores are read back from the
store. A row that cannot be scored keeps its place, with its problem instead of scores.
"""

from __future__ import annotations

from collections import Counter
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
from pipeline.precompute.launch import score_windows
from pipeline.precompute.plan import Window
from pipeline.precompute.score import check_scores, table_of
from pipeline.progress import SILENT, Listener
from pipeline.store.adoption import serve_from_adopted
from pipeline.store.identity import ReferenceIdentity, score_key
from pipeline.store.store import Store

_AT_ONCE = 8192


class RowScorer:
    """Scores the rows of files with the columns prompt and response, in nats, through the store; a context manager.

    The engine starts with the first sequence that the store lacks, and stops on leaving the context. `listener` hears how actors of
    Ray get on.
    """

    def __init__(self, config: Config, listener: Listener = SILENT) -> None:
        self._config, self._listener = config, listener
        self._reference = reference = open_reference(config.reference)
        # said before any row is read: new responses have no score that was imported
        must_compute(reference.numerics)
        self._positions = position_limit(reference.paths.base)
        self._encoder = Encoder(config.data, reference.tokenizer, self._positions)
        self.identity: ReferenceIdentity = reference.identity
        self._store = Store(config.reference.store, self.identity)
        self._engine = Growing(reference, config.data.max_length)
        self._quarantined: dict[bytes, str] = {}
        self.hits = self.adopted = self.scored = self.dropped = 0
        # of how many sequences adopted references computed the scores, now or before, by their ids
        self.computed_by: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
        self._store.finish()

    def tables(self, source: Path) -> Iterator[pa.Table]:
        """SCORED's rows of `source`, part by part, in order. Raises DataError if the columns are not there.

        Actors of Ray score all that is missing before the first part is read back, from `source` once more.
        """
        before: dict[bytes, bool] = {}
        if self._reference.config.in_actors:
            windows = self._windows(source, before)
            outcome = score_windows(
                self._reference, windows, listener=self._listener, limit=self._config.data.max_length
            )
            self._quarantined |= outcome.quarantined
        for part in self._parts(source):
            yield self._scored(part, before)

    def _windows(self, source: Path, before: dict[bytes, bool]) -> Iterator[Window]:
        """What the store lacks of the file; `before` gets its keys, and whether they are scored, or adopted."""
        for part in self._parts(source):
            absent = part.wanted.take(pa.array(self._store.lookup(part.wanted).missing)).to_pylist()
            left = self._not_adopted({key: part.requests[key] for key in absent if key not in before})
            before |= {key: False for key in absent if key not in before} | dict.fromkeys(left["key"].to_pylist(), True)
            yield Window(left, 0)

    def _not_adopted(self, asked: dict[bytes, Request]) -> pa.Table:
        return serve_from_adopted(self._store, table_of(asked))

    def _parts(self, source: Path) -> Iterator[_Part]:
        rows, _ = open_rows(str(source), self._config.data)
        numbered = enumerate(rows())
        while part := list(islice(numbered, _AT_ONCE)):
            items = [preference_of(str(source), number, row) for number, row in part]
            yield _Part(items, list(self._encoder.chosen(items)), self.identity.reference_id)

    def _scored(self, part: _Part, before: dict[bytes, bool]) -> pa.Table:
        lookup = self._store.lookup(part.wanted)
        known = [before.pop(key) for key in part.wanted.take(pa.array(lookup.held)).to_pylist() if key in before]
        self.hits += len(lookup.held) - len(known)
        absent = part.wanted.take(pa.array(lookup.missing)).to_pylist()
        asked = {key: part.requests[key] for key in absent if key not in self._quarantined}
        if asked:
            left = self._not_adopted(asked)
            known += [False] * (len(asked) - len(left))
            self._score({key: asked[key] for key in left["key"].to_pylist()})
            lookup = self._store.lookup(part.wanted)
        self.scored, self.adopted = self.scored + sum(known), self.adopted + len(known) - sum(known)
        self.computed_by.update({by: len(held) for by, held in lookup.held_from_adopted().items()})
        scores = {row["key"]: row for row in lookup.found().iter_rows(named=True)}
        rows = [
            scored_row(item, self._or_quarantined(item, encoding, key), scores.get(key))
            for item, encoding, key in zip(part.items, part.encoded, part.keys, strict=True)
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

    def _score(self, asked: dict[bytes, Request]) -> None:
        if not asked:
            return
        keys = sorted(asked, key=lambda key: (list(asked[key].prompt_ids), -len(asked[key])))
        sequences = [asked[key] for key in keys]
        rows, quarantined = check_scores(keys, sequences, score_each(self._engine, sequences))
        if rows:
            self._store.publish(rows, circumstances())
        self.scored += len(rows)
        self._quarantined |= quarantined


class _Part:
    """Rows as they are encoded, and the sequences that have a score by their keys; `keys` has None for a row without."""

    def __init__(self, items: list[Preference | Dropped], encoded: list[Encoded | Dropped], reference_id: str) -> None:
        self.items, self.encoded = items, encoded
        self.keys: list[bytes | None] = []
        self.requests: dict[bytes, Request] = {}
        for encoding in encoded:
            if isinstance(encoding, Dropped):
                self.keys.append(None)
                continue
            request = Request(encoding.prompt_ids, encoding.responses[0])
            key = score_key(reference_id, request.prompt_ids, request.response_ids)
            self.keys.append(key)
            self.requests[key] = request
        self.wanted = pa.array(list(self.requests), pa.binary(32))


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
