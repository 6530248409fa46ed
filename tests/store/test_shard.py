"""What must hold of rows, one problem at a time."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.store.shard import logps_problem, rows_problem


@pytest.mark.parametrize(
    ("logps", "tokens", "problem"),
    [
        ([-1.0, 0.0], 2, None),
        ([0.0], 1, None),
        ([-1.0], 2, "1 values for 2 tokens"),
        ([-1.0, -2.0, -3.0], 2, "3 values for 2 tokens"),
        ([-1.0, np.nan, np.inf], 3, "value 1 is not finite"),
        ([-1.0, -2.0, -np.inf], 3, "value 2 is not finite"),
        ([0.0, 0.5, 2.0], 3, "value 1 is 2.0, above 0"),
        ([0.0, -1.0, 0.25], 3, "value 2 is 0.25, above 0"),
    ],
)
def test_log_probabilities_that_cannot_be_true(logps, tokens, problem):
    values = np.array(logps, np.float32)
    assert logps_problem(values, tokens) == problem
    sound = [-0.5, -0.25]
    assert rows_problem(rows([sound, logps, sound], [2, tokens, 2])) == (problem and f"row 1: {problem}")


def rows(logps, tokens, shift=0.0):
    sums = [float(np.array(one, np.float32).sum(dtype=np.float64)) for one in logps]
    sums[-1] += shift
    return pa.table(
        {
            "key": pa.array([bytes([at]) * 32 for at in range(len(logps))], pa.binary(32)),
            "prompt_tokens": [3] * len(logps),
            "response_tokens": tokens,
            "logps": [np.array(one, np.float32) for one in logps],
            "logp": sums,
        },
        schema=SCORES,
    )


@pytest.mark.parametrize(
    ("shift", "wrong"), [(0.0, False), (1e-13, False), (1e-9, True), (-1e-9, True), (np.nan, True)]
)
def test_a_sum_is_that_of_its_values(shift, wrong):
    assert rows_problem(rows([[-1.0], [-0.5, -0.25]], [1, 2], shift)) == (
        "row 1: logp is not the sum of logps" if wrong else None
    )


def test_no_rows_are_no_problem_and_no_values_are():
    assert rows_problem(SCORES.empty_table()) is None
    assert rows_problem(rows([[-1.0], []], [1, 0])) == "row 1: 0 values for 0 tokens"
    table = rows([[-1.0]], [1])
    for name in SCORES.names:
        absent = table.set_column(table.schema.get_field_index(name), name, pa.nulls(1, SCORES.field(name).type))
        assert rows_problem(absent) == "a value is absent"
