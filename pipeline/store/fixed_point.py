"""Logps as whole numbers of 2^-12 nats, which take less than half the bytes of float32 and are off by at most 2^-13 nats.

For references that compute in bfloat16 or float16, whose own arithmetic is off by a hundred times as much. The sum of a response
is kept in float64, of the values before they were rounded. What is read and published again is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipeline.artifacts.schemas import ROUNDED_SCORES, SCORES

# what reference.logps, and the numerics of an identity, call it
FIXED_POINT = "fixed_point"
UNIT = 2.0**-12
# of a value; a sum of n of them is off by at most n times as much
LARGEST_ERROR = UNIT / 2
# nats; below it the whole number does not fit 32 bits
LOWEST = -UNIT * (2**31 - 1)


def rounded(table: pa.Table) -> pa.Table:
    """Rows of SCORES as they are stored, rows of ROUNDED_SCORES; no value may be below LOWEST."""
    return _with(table, lambda values: np.rint(values / np.float64(-UNIT)).astype(np.int32), ROUNDED_SCORES)


def restored(table: pa.Table) -> pa.Table:
    """Rows of ROUNDED_SCORES as rows of SCORES; a table without their logps is returned as it is."""
    if "logps" not in table.column_names:
        return table
    # 0 - x: nothing becomes -0.0
    return _with(table, lambda values: (0 - values * UNIT).astype(np.float32), SCORES)


def _with(table: pa.Table, convert: Callable[[np.ndarray], np.ndarray], schema: pa.Schema) -> pa.Table:
    lists, field = table["logps"].combine_chunks(), schema.field("logps")
    values = convert(lists.flatten().to_numpy(zero_copy_only=False))
    converted = pa.ListArray.from_arrays(lists.offsets, pa.array(values), type=field.type)
    return table.set_column(table.column_names.index("logps"), field, converted)
