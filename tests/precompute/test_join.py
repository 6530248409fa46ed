"""Scores that lie among the rows in any order are read in one pass over the shards, and joined in the order of the rows."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import PAIRS
from pipeline.config.files import load_config
from pipeline.errors import RefscoreError
from pipeline.pairs import table as pair_table
from pipeline.precompute.join import _Scores, joined
from pipeline.precompute.plan import make_plan
from pipeline.store.identity import score_key
from pipeline.store.lookup import Lookup
from pipeline.store.store import Scored, Store
from tests.conftest import experiment, preference_rows, write_rows
from tests.store.test_store import REFERENCE


@pytest.fixture
def plan(tmp_path, tiny_model, monkeypatch):
    """Eleven pairs in row groups of four, their scores in shards of three in no order."""
    monkeypatch.setattr(pair_table, "GROUP", 4)
    plan = make_plan(
        load_config(experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(11))))
    )
    rows = []
    for position in np.random.default_rng(0).permutation(plan.missing).tolist():
        request = plan.request(position)
        key = score_key(plan.identity.reference_id, request.prompt_ids, request.response_ids)
        rows.append(Scored(key, len(request.prompt_ids), scores_of(request.response_ids)))
    for start in range(0, len(rows), 3):
        plan.store.publish(rows[start : start + 3])
    return plan


def scores_of(ids):
    return -np.asarray(ids, dtype=np.float32) / 100


def test_every_pair_gets_its_own_scores_bit_for_bit_and_no_shard_is_read_twice(plan, monkeypatch):
    asked, read = [], Lookup.rows
    monkeypatch.setattr(Lookup, "rows", lambda self, positions: asked.append(len(positions)) or read(self, positions))
    rows = pa.concat_tables(joined(plan)).to_pylist()
    assert asked == [22]
    assert len(rows) == 11
    for row in rows:
        for side in ("chosen", "rejected"):
            scores = scores_of(row[f"{side}_ids"])
            assert row[f"ref_{side}_token_logps"] == scores.tolist()
            assert row[f"ref_{side}_logps"] == scores.sum(dtype=np.float64)


def test_a_lookup_that_was_made_before_is_used(plan, monkeypatch):
    lookup = plan.store.lookup(plan.keys)
    monkeypatch.setattr(type(plan.store), "lookup", lambda *_: pytest.fail("asked"))
    assert sum(map(len, joined(plan, lookup=lookup))) == 11


def test_what_has_no_score_is_nan_in_the_working_file_and_never_nought(plan):
    gone = plan.store.lookup(plan.keys)
    held = np.setdiff1d(np.arange(22), [6, 7])
    gone.rows = lambda positions, rows=gone.rows: rows(held)
    scores = _Scores(plan, {3}, gone)
    begin, end = scores._offsets[[6, 8]]
    assert np.isnan(scores._values[begin:end]).all()
    assert not np.isnan(scores._values[:begin]).any()
    assert not np.isnan(scores._values[end:]).any()


def test_a_disk_without_space_for_the_scores_is_a_message_and_no_kill(plan, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pipeline.precompute.join.os.posix_fallocate", full)
    with pytest.raises(RefscoreError, match=r"no space left to write .*about [\d,]+ bytes are needed"):
        list(joined(plan))


def test_what_lies_in_the_working_file_is_not_held_in_memory(tmp_path):
    """Four million scores: of the file as it is mapped nothing stays, neither after writing nor after reading."""
    store = Store([str(tmp_path)], REFERENCE)
    rows = [Scored(bytes([number]) * 32, 1, scores_of(range(20_000))) for number in range(200)]
    store.publish(rows)
    pairs = SimpleNamespace(response_tokens=np.full(200, 20_000, np.int32), schema=PAIRS)
    keys = pa.array([row.key for row in rows], pa.binary(32))
    plan = SimpleNamespace(pairs=pairs, keys=keys, sides=("chosen", "rejected"), imported=False)
    scores = _Scores(plan, (), store.lookup(keys))
    assert resident(len(scores._file)) < 2**20
    columns = scores.columns(40, 60)
    assert columns["ref_rejected_token_logps"][3].as_py() == rows[87].logps.tolist()
    assert resident(len(scores._file)) < 2**20


def resident(size):
    """Bytes in memory of this process's mapping of a removed file of that size."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.endswith("(deleted)"):
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            if 0 <= end - begin - size < 4096:
                return 1024 * int(next(words[1] for words in map(str.split, lines[number:]) if words[0] == "Rss:"))
    raise AssertionError("no such mapping")
