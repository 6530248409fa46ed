"""One pure function: a table of sequences in, the same table with their scores out. What workers and Ray run.

Columns `prompt_ids` and `response_ids` (list<int32>) come in, `logps` (list<float32>) is added, others pass through.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.artifacts.tables import arrays_of, list_column
from pipeline.engines.protocol import Request, Scorer
from pipeline.engines.quarantine import score_each

_IDS = pa.list_(pa.int32())
_LOGPS = pa.list_(pa.float32())


def score(table: pa.Table, scorer: Scorer) -> pa.Table:
    """`table` with the column `logps`; row order stays."""
    return table.append_column("logps", list_column(score_each(scorer, requests_in(table)), _LOGPS))


def table_of(requests: Sequence[Request]) -> pa.Table:
    """The table of these sequences."""
    return pa.table(
        {
            "prompt_ids": pa.array([list(request.prompt_ids) for request in requests], _IDS),
            "response_ids": pa.array([list(request.response_ids) for request in requests], _IDS),
        }
    )


def requests_in(table: pa.Table) -> list[Request]:
    """The table's sequences."""
    columns = (table[name].to_pylist() for name in ("prompt_ids", "response_ids"))
    return [Request(prompt, response) for prompt, response in zip(*columns, strict=True)]


def logps_in(table: pa.Table) -> list[np.ndarray]:
    """The table's scores, one float32 array per row."""
    return arrays_of(table, "logps")


def to_bytes(table: pa.Table) -> bytes:
    """Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_bytes(content: bytes) -> pa.Table:
    """The inverse of `to_bytes`."""
    with pa.ipc.open_stream(content) as reader:
        return reader.read_all()
