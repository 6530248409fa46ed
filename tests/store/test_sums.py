"""Scores of which a sum is all that is known: allowed where others computed them, damage everywhere else."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import SCORES
from pipeline.artifacts.tables import write_parquet
from pipeline.errors import CheckError, DataError
from pipeline.store.identity import ReferenceIdentity, imported_numerics
from pipeline.store.local_places import LocalPlace
from pipeline.store.shard import check_shard, sha256_now, shard_files, sums_problem
from pipeline.store.store import Store
from pipeline.store.tidying.compaction import compact, groups_of
from pipeline.store.tidying.inventory import holding
from pipeline.store.transfer import copy_rows, copy_shards, described_references
from tests.store.test_store import REFERENCE, keys, scored

IMPORTED = dataclasses.replace(REFERENCE, numerics=imported_numerics("Lab A", "bfloat16"))
ROWS = [scored(n) for n in range(8)]


def sums_of(rows, values=()):
    return pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.binary(32)),
            "prompt_tokens": [row.prompt_tokens for row in rows],
            "response_tokens": [len(row.logps) for row in rows],
            "logps": [np.array(values, np.float32)] * len(rows),
            "logp": [float(row.logps.sum(dtype=np.float64)) for row in rows],
        },
        schema=SCORES,
    )


def forged(directory, table, about):
    """A shard as nobody of ours would publish it."""
    path = directory / "shard.parquet"
    write_parquet(path, table, about)
    return path.rename(directory / f"scores-{sha256_now(path)}.parquet")


def test_sums_go_in_and_come_out(tmp_path):
    store = Store([str(tmp_path)], IMPORTED)
    store.publish_table(sums_of(ROWS[:3]))
    store.publish(ROWS[3:5])
    found = store.lookup(keys(*ROWS))
    assert found.missing.tolist() == [5, 6, 7]
    assert found.held_as_sums.tolist() == [0, 1, 2]
    table = {row["key"]: row for row in found.found().iter_rows(named=True)}
    for number, row in enumerate(ROWS[:5]):
        assert table[row.key]["logp"] == float(row.logps.sum(dtype=np.float64))
        assert table[row.key]["logps"] == ([] if number < 3 else row.logps.tolist())
    assert [check_shard(shard) for shard in shard_files(tmp_path / IMPORTED.reference_id)] == [None, None]
    held = holding(IMPORTED.reference_id, store.places[0])
    assert (held.numerics, held.sequences) == ("imported by Lab A, unverified, dtype bfloat16", 5)


def test_of_scores_that_were_computed_an_empty_list_is_refused(tmp_path):
    with pytest.raises(CheckError, match="0 values for"):
        Store([str(tmp_path)], REFERENCE).publish_table(sums_of(ROWS[:2]))
    with pytest.raises(CheckError, match="values for"):
        # one of a table with values
        Store([str(tmp_path)], IMPORTED).publish_table(
            pa.concat_tables([sums_of(ROWS[:1]), sums_of(ROWS[1:2], ROWS[1].logps)]).combine_chunks()
        )


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("logp", 0.5, "row 1: logp is above 0"),
        ("logp", float("nan"), "row 1: logp is not finite"),
        ("logp", float("-inf"), "row 1: logp is not finite"),
        ("response_tokens", 0, "row 1: no tokens"),
        ("logps", [-1.0], "row 1: values of tokens among sums"),
        ("logp", -3.0, None),
    ],
)
def test_sums_that_cannot_be_true(tmp_path, column, value, problem):
    rows = sums_of(ROWS[:3]).to_pylist()
    rows[1][column] = value
    table = pa.Table.from_pylist(rows, schema=SCORES)
    assert sums_problem(table) == problem
    store = Store([str(tmp_path)], IMPORTED)
    store.publish_table(sums_of(ROWS[3:]))
    shard = forged(tmp_path / IMPORTED.reference_id, table, {"sums_only": True})
    found = store.lookup(keys(*ROWS))
    found.found()
    # a shard that holds such a row is set aside, whole
    assert found.missing.tolist() == ([0, 1, 2] if problem else [])
    assert shard.exists() == (problem is None)


def test_a_shard_that_does_not_say_so_is_damaged(tmp_path):
    store = Store([str(tmp_path)], IMPORTED)
    store.publish_table(sums_of(ROWS[3:]))
    shard = forged(tmp_path / IMPORTED.reference_id, sums_of(ROWS[:3]), {})
    assert "0 values for" in check_shard(shard)
    assert LocalPlace(tmp_path / IMPORTED.reference_id).examine(shard.name, "") is False


def test_sums_are_merged_with_sums_alone(tmp_path):
    store = Store([str(tmp_path)], IMPORTED)
    for row in ROWS[:2]:
        store.publish([row])
    for row in ROWS[2:5]:
        store.publish_table(sums_of([row]))
    before = store.lookup(keys(*ROWS)).found().sort("key")
    place = store.places[0]
    groups = groups_of(place, place.entries())
    assert sorted(map(len, groups)) == [2, 3]
    assert sorted(compact(store, group) for group in groups) == [2, 3]
    assert not groups_of(place, place.entries())
    lookup = store.lookup(keys(*ROWS))
    assert lookup.found().sort("key").equals(before)
    assert lookup.held_as_sums.tolist() == [2, 3, 4]
    assert [check_shard(shard) for shard in shard_files(place.directory)] == [None, None]


def test_copies_keep_what_they_are(tmp_path):
    source, whole, part = (str(tmp_path / name) for name in ("source", "whole", "part"))
    store = Store([source], IMPORTED)
    store.publish_table(sums_of(ROWS[:3]))
    store.publish(ROWS[3:5])
    assert described_references(source) == {IMPORTED.reference_id: IMPORTED}
    copy_shards(source, whole, [IMPORTED])
    copied = copy_rows(keys(*ROWS[1:4]), source, part, IMPORTED)
    assert (copied.rows, copied.unsound) == (3, {})
    for place, sums in ((whole, [0, 1, 2]), (part, [1, 2])):
        assert Store([place], IMPORTED).lookup(keys(*ROWS)).held_as_sums.tolist() == sums


def test_sums_that_stand_under_another_identity_are_not_copied(tmp_path):
    Store([str(tmp_path / "source")], REFERENCE).publish(ROWS[3:])
    forged(tmp_path / "source" / REFERENCE.reference_id, sums_of(ROWS[:3]), {"sums_only": True})
    (copied,) = copy_shards(str(tmp_path / "source"), str(tmp_path / "target"), [REFERENCE])
    assert (copied.rows, list(copied.unsound.values())) == (
        5, ["it holds sums only, and its reference's scores are of tokens"],
    )  # fmt: skip
    copied = copy_rows(keys(*ROWS), str(tmp_path / "source"), str(tmp_path / "other"), REFERENCE)
    assert copied.rows == 5
    assert len(copied.unsound) == 1


def test_what_names_imported_scores():
    """The importer's word and the dtype; identities of computed scores hold neither."""
    others = [imported_numerics("Lab B", "bfloat16"), imported_numerics("Lab A", "unknown")]
    identities = {dataclasses.replace(REFERENCE, numerics=numerics).reference_id for numerics in others}
    assert len(identities | {REFERENCE.reference_id, IMPORTED.reference_id}) == 4
    assert ReferenceIdentity.from_described(json.loads(json.dumps(IMPORTED.described()))) == IMPORTED
    assert REFERENCE.described()["numerics"] == {
        "engine": "vllm", "engine_version": "0", "device": "cpu", "dtype": "float32", "logits_dtype": "float32",
        "quantization": "none",
    }  # fmt: skip
    with pytest.raises(DataError):
        ReferenceIdentity.from_described({**IMPORTED.described(), "numerics": {"engine": "imported"}})
