"""The likeliest tokens at every position of given responses, for distillation: what a teacher would have said there.

Rows stream, part by part, to one engine in this process. Nothing of it enters the store, whose scores are of the responses'
own tokens: every call computes anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import SCORED, TOP_SCORED
from pipeline.artifacts.tables import list_column
from pipeline.config.experiment import Config
from pipeline.engines.protocol import Request, TopTokens, must_compute
from pipeline.engines.quarantine import score_each, why_quarantined
from pipeline.engines.reference import open_reference
from pipeline.engines.single import SmallerOnce, start_single
from pipeline.errors import ConfigError
from pipeline.models.configuration import position_limit, text_config
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.preferences import Dropped, Preference
from pipeline.pairs.rows import open_rows
from pipeline.precompute.responses import preference_of, scored_row

# rows that are tokenised together
_ROWS = 2048
# likeliest tokens of rows that are answered together; vLLM takes about a hundred bytes for each
_VALUES = 1 << 20
# columns that vLLM answers unless it is told otherwise
_COLUMNS = 20


class TopScorer:
    """The `count` likeliest tokens, and the responses' own scores, of files with the columns prompt and response; a context
    manager. The engine starts with the first row that can be scored, and stops on leaving the context.
    """

    def __init__(self, config: Config, count: int) -> None:
        self._config, self._count = config, count
        self._reference = open_reference(config.reference)
        must_compute(self._reference.numerics)
        base = self._reference.paths.base
        vocabulary = int(text_config(base, trusts_code=config.reference.trust_remote_code).vocab_size)
        if not 1 <= count <= vocabulary:
            raise ConfigError(f"--top-k {count}: the model has {vocabulary} tokens, ask for 1 to {vocabulary} of them")
        self._settings = config.reference
        if config.reference.engine == "vllm" and count > _COLUMNS:
            more = {**config.reference.engine_args, "max_logprobs": count}
            self._settings = self._settings.model_copy(update={"engine_args": more})
        self._positions = position_limit(base)
        self._encoder = Encoder(config.data, self._reference.tokenizer, self._positions)
        self._engine: SmallerOnce | None = None
        self._longest = 0
        self.identity = self._reference.identity
        self.scored = self.dropped = self.not_finite = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def tables(self, source: Path) -> Iterator[pa.Table]:
        """TOP_SCORED's rows of `source`, part by part, in order. Raises DataError if the columns are not there.

        A part is as large as its tables of likeliest tokens allow: memory grows with neither rows nor `count`.
        """
        rows, _ = open_rows(str(source), self._config.data)
        numbered = enumerate(rows())
        while read := list(islice(numbered, _ROWS)):
            items = [preference_of(str(source), number, row) for number, row in read]
            encoded = list(self._encoder.chosen(items))
            longest = max((len(_request(one)) for one in encoded if not isinstance(one, Dropped)), default=0)
            for part in _parts(encoded, self._count):
                yield self._part(items[part.start : part.stop], encoded[part.start : part.stop], longest)

    def _part(self, items: list[Preference | Dropped], encoded: list[Encoded | Dropped], longest: int) -> pa.Table:
        asked = [number for number, one in enumerate(encoded) if not isinstance(one, Dropped)]
        own, top = self._ask([_request(encoded[number]) for number in asked], longest)
        scores = dict(zip(asked, own, strict=True))
        likeliest: list[TopTokens | None] = [None] * len(items)
        for number, logps, found in zip(asked, own, top, strict=True):
            if (why := _not_finite(logps, found)) is not None:
                encoded[number] = Dropped(items[number].source, items[number].row, "not_finite", why)
                self.not_finite += 1
            else:
                likeliest[number] = found
        written = []
        for number, (item, encoding) in enumerate(zip(items, encoded, strict=True)):
            values = scores.get(number)
            score = None if values is None else {"logps": values, "logp": float(values.sum(dtype=np.float64))}
            written.append(scored_row(item, encoding, score))
        dropped = sum(row["problem"] is not None for row in written)
        self.scored += len(items) - dropped
        self.dropped += dropped
        table = pa.Table.from_pylist(written, schema=SCORED)
        for name in ("ids", "logps"):
            field = TOP_SCORED.field(f"top_{name}")
            arrays = [None if found is None else getattr(found, name) for found in likeliest]
            table = table.append_column(field, _tables_column(arrays, self._count, field.type))
        return table

    def _ask(self, requests: Sequence[Request], longest: int) -> tuple[list[np.ndarray], list[TopTokens]]:
        if not requests:
            return [], []
        engine = self._engine_for(longest)
        own, top = score_each(engine, requests), engine.top(requests, self._count)
        for number, found in enumerate(top):
            # others in its batch may have spoiled it
            if len(top) > 1 and why_quarantined(own[number]) is None and not np.isfinite(found.logps).all():
                top[number] = engine.top([requests[number]], self._count)[0]
        return own, top

    def _engine_for(self, longest: int) -> SmallerOnce:
        if self._engine is None or longest > self._longest:
            self._stop()
            # up, so that a row that is a little longer than those before it starts no engine anew
            self._longest = min(1 << (longest - 1).bit_length(), self._positions or sys.maxsize)
            paths, numerics = self._reference.paths, self._reference.numerics
            self._engine = start_single(self._settings, paths.merged, numerics, self._longest)
        return self._engine

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _request(encoded: Encoded | Dropped) -> Request:
    if isinstance(encoded, Dropped):
        raise TypeError("a dropped row has no ids")
    return Request(encoded.prompt_ids, encoded.responses[0])


def _parts(encoded: Sequence[Encoded | Dropped], count: int) -> Iterator[range]:
    """Places of rows that are answered together: as many as _VALUES allows, and at least one."""
    start = values = 0
    for number, one in enumerate(encoded):
        # vLLM answers for the prompt's positions too, and for each position's own token beside the likeliest
        more = 0 if isinstance(one, Dropped) else len(_request(one)) * (count + 1)
        if number > start and values + more > _VALUES:
            yield range(start, number)
            start, values = number, 0
        values += more
    if start < len(encoded):
        yield range(start, len(encoded))


def _not_finite(own: np.ndarray, found: TopTokens) -> str | None:
    """Which value of a row is no finite number; None if all are."""
    if not np.isfinite(own).all():
        return f"value {int(np.argmin(np.isfinite(own)))} of {len(own)} is not finite"
    whole = np.isfinite(found.logps).all(axis=1)
    if not whole.all():
        return f"the likeliest tokens at {int(np.argmin(whole))} of {len(own)} are not finite"
    return None


def _tables_column(tables: Sequence[np.ndarray | None], count: int, kind: pa.DataType) -> pa.ListArray:
    """A column of `kind`, lists of lists of `count` values: one table [tokens, count] per row, null for None."""
    tokens = [0 if table is None else len(table) for table in tables]
    flat = [table.reshape(-1) for table in tables if table is not None]
    rows = list_column(flat, kind.value_type)
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(sum(tokens) + 1, dtype=np.int32) * np.int32(count)), rows.values, type=kind.value_type
    )
    offsets = pa.array(np.cumsum([0, *tokens], dtype=np.int32))
    missing = pa.array([table is None for table in tables])
    return pa.ListArray.from_arrays(offsets, inner, type=kind, mask=missing)
