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

from pipeline.artifacts.tables import TOP_SCORED
from pipeline.config.experiment import Config
from pipeline.engines.protocol import Request, TopTokens
from pipeline.engines.reference import open_reference
from pipeline.engines.single import SmallerOnce, start_single
from pipeline.errors import ConfigError
from pipeline.models.configuration import position_limit, text_config
from pipeline.pairs.encoding import Encoded, Encoder
from pipeline.pairs.preferences import Dropped
from pipeline.pairs.rows import open_rows
from pipeline.precompute.responses import preference_of, scored_row

_PART = 2048
# columns that vLLM answers unless it is told otherwise
_COLUMNS = 20


class TopScorer:
    """The `count` likeliest tokens, and the responses' own scores, of files with the columns prompt and response; a context
    manager. The engine starts with the first row that can be scored, and stops on leaving the context.
    """

    def __init__(self, config: Config, count: int) -> None:
        self._config, self._count = config, count
        self._reference = open_reference(config.reference)
        base = self._reference.paths.base
        vocabulary = int(text_config(base, trusts_code=config.reference.trust_remote_code).vocab_size)
        if not 1 <= count <= vocabulary:
            raise ConfigError(f"--top-k {count}: the model has {vocabulary} tokens, ask for 1 to {vocabulary} of them")
        self._settings = config.reference.model_copy(update={"workers": 1})
        if config.reference.engine == "vllm" and count > _COLUMNS:
            more = {**config.reference.engine_args, "max_logprobs": count}
            self._settings = self._settings.model_copy(update={"engine_args": more})
        self._positions = position_limit(base)
        self._encoder = Encoder(config.data, self._reference.tokenizer, self._positions)
        self._engine: SmallerOnce | None = None
        self._longest = 0
        self.identity = self._reference.identity
        self.scored = self.dropped = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def tables(self, source: Path) -> Iterator[pa.Table]:
        """TOP_SCORED's rows of `source`, part by part, in order. Raises DataError if the columns are not there."""
        rows, _ = open_rows(str(source), self._config.data)
        numbered = enumerate(rows())
        while part := list(islice(numbered, _PART)):
            items = [preference_of(str(source), number, row) for number, row in part]
            encoded = list(self._encoder.chosen(items))
            asked = [number for number, found in enumerate(encoded) if not isinstance(found, Dropped)]
            own, top = self._ask([_request(encoded[number]) for number in asked])
            scores = dict(zip(asked, own, strict=True))
            found = dict(zip(asked, top, strict=True))
            filled = []
            for number, (item, encoding) in enumerate(zip(items, encoded, strict=True)):
                logps = scores.get(number)
                score = None if logps is None else {"logps": logps, "logp": float(logps.sum(dtype=np.float64))}
                likeliest = found.get(number)
                filled.append(
                    scored_row(item, encoding, score)
                    | {
                        "top_ids": None if likeliest is None else likeliest.ids.tolist(),
                        "top_logps": None if likeliest is None else likeliest.logps.tolist(),
                    }
                )
            self.scored += len(asked)
            self.dropped += len(items) - len(asked)
            yield pa.Table.from_pylist(filled, schema=TOP_SCORED)

    def _ask(self, requests: Sequence[Request]) -> tuple[list[np.ndarray], list[TopTokens]]:
        if not requests:
            return [], []
        engine = self._engine_for(max(map(len, requests)))
        return engine.score(requests), engine.top(requests, self._count)

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
