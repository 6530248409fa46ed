"""An oracle of scores, child processes that die at a named moment, and the table of what was tried."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.models.identity import ModelIdentity
from pipeline.store.identity import Numerics, ReferenceIdentity, score_key
from pipeline.store.shard import shard_files
from pipeline.store.store import Scored, Store

REFERENCE = ReferenceIdentity(ModelIdentity({"w": "00"}, {}), Numerics("vllm", "0", "cpu", "float32", "float32"))
TABLE = Path(__file__).parent / "README.md"
CASES: Counter[str] = Counter()
# `make faults` tries everything, and writes down what was tried; the tests try a part
EVERYTHING = bool(os.environ.get("REFSCORE_WRITE_FAULT_TABLE"))


@cache
def oracle(number: int) -> Scored:
    """The one true score of sequence `number`: a function of the number alone."""
    logps = -np.random.default_rng(number).random(20 + number % 7, dtype=np.float32)
    return Scored(score_key(REFERENCE.reference_id, [number], range(len(logps))), 1, logps)


def build(value: float):
    """A small model whose weights began at `value`, and its optimizer after one step."""
    import torch

    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def open_store(where: Path) -> Store:
    return Store([str(where)], REFERENCE)


def shard_names(where: Path) -> list[str]:
    """Names of the shards in the store."""
    return [shard.name for shard in shard_files(where / REFERENCE.reference_id)]


def keys_of(numbers) -> pa.FixedSizeBinaryArray:
    return pa.array([oracle(number).key for number in numbers], pa.binary(32))


def found_numbers(where: Path, numbers) -> set[int]:
    """Which of `numbers` the store returns; every returned value must be the oracle's, every key returned once."""
    numbers = list(numbers)
    return check_rows(open_store(where).lookup(keys_of(numbers)).found(), numbers)


def check_rows(rows, numbers) -> set[int]:
    """The numbers whose rows these are; every value must be the oracle's, every key stand once."""
    by_key = {oracle(number).key: number for number in numbers}
    for key, logps, logp in rows.select("key", "logps", "logp").iter_rows():
        truth = oracle(by_key[key]).logps
        assert np.array_equal(np.array(logps, dtype=np.float32), truth)
        assert logp == truth.sum(dtype=np.float64)
    assert rows["key"].n_unique() == len(rows)
    return {by_key[key] for key in rows["key"]}


PREAMBLE = """
import os, resource, signal, sys
from pathlib import Path
import pipeline.artifacts.durable as durable
from tests.faults.conftest import build, oracle, open_store
def die_at(point, count=1):
    seen = [0]
    def reached(name):
        if name == point:
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
    durable.reached = reached
"""


def child(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a Python process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        **options,
    )


@pytest.fixture
def case(request: pytest.FixtureRequest):
    """Count a passed case under its title in the table."""
    titles: list[str] = []
    yield titles.append
    if not getattr(request.node, "failed", False):
        CASES.update(titles)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if outcome.get_result().failed:
        item.failed = True


def pytest_sessionfinish(session, exitstatus) -> None:
    """`make faults` writes the table of cases beside these tests."""
    if EVERYTHING and CASES and exitstatus == 0:
        rows = "".join(f"| {title} | {count} |\n" for title, count in sorted(CASES.items()))
        TABLE.write_text(
            "# Faults\n\n`make faults` runs these cases and writes this table. In every one: no traceback, no published key "
            "lost, no\nvalue other than the oracle's, and the next run goes on.\n\n"
            f"| case | times |\n|---|---:|\n{rows}\n{sum(CASES.values())} cases.\n"
        )
