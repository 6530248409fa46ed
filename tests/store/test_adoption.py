"""What an adopted reference computed stands in for today's scores: those rows alone, and never without saying whose they are."""

import dataclasses
import json
import logging

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import MISSING
from pipeline.errors import DataError
from pipeline.models.identity import ModelIdentity
from pipeline.store.adoption import (
    Adoption,
    adopt,
    adoptions,
    held_by_adopted,
    recorded,
    revoke,
    serve_from_adopted,
)
from pipeline.store.identity import keys_of, score_key
from pipeline.store.shard import check_shard, shard_files
from pipeline.store.store import Scored, Store
from pipeline.store.transfer import copy_rows, copy_shards
from tests.store.test_store import REFERENCE

FIGURES = {"mean_absolute_difference": 1e-6}


def version(number):
    return dataclasses.replace(
        REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, engine_version=f"0.{number}")
    )


OLDEST, OLD, NEW = version(1), version(2), version(3)


def adoption(adopted=OLD, by=NEW):
    return Adoption(adopted, by, FIGURES, FIGURES, "2026-01-02T03:04:05+00:00")


def ids(number):
    return [number, 7], list(range(2 + number % 3))


def row(reference, number):
    prompt, response = ids(number)
    logps = -np.random.default_rng(number).random(len(response), dtype=np.float32)
    return Scored(score_key(reference.reference_id, prompt, response), len(prompt), logps)


def missing(*numbers):
    """Rows of MISSING under today's reference."""
    prompts, responses = zip(*map(ids, numbers), strict=True)
    keys = [row(NEW, number).key for number in numbers]
    return pa.table([pa.array(keys, pa.binary(32)), list(prompts), list(responses)], schema=MISSING)


def held_of(store, *numbers):
    """Positions of the rows `numbers` that adopted references hold, by their ids."""

    def keys_under(reference_id, positions):
        return keys_of(reference_id, missing(*numbers).take(pa.array(positions)))

    held = held_by_adopted(store, np.arange(len(numbers)), keys_under)
    return {by: positions.tolist() for by, positions in held.items()}


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def store(place):
    """Today's store, beside one in which the earlier reference has the rows 0 to 5."""
    Store([place], OLD).publish([row(OLD, number) for number in range(6)])
    return Store([place], NEW)


def test_what_is_held_is_published_under_todays_keys(store):
    adopt(store, adoption())
    assert serve_from_adopted(store, missing(9, 4, 1, 8)).equals(missing(9, 8))
    lookup = store.lookup(missing(4, 1, 8)["key"].combine_chunks())
    assert lookup.missing.tolist() == [2]
    assert {by: held.tolist() for by, held in lookup.held_from_adopted().items()} == {OLD.reference_id: [0, 1]}
    found = {one["key"]: one for one in lookup.found().iter_rows(named=True)}
    for number in (4, 1):
        expected = row(NEW, number)
        assert found[expected.key]["logps"] == expected.logps.tolist()
        assert found[expected.key]["prompt_tokens"] == 2
    assert [check_shard(shard) for shard in shard_files(store.places[0].directory)] == [None]


def test_nothing_is_served_that_was_not_adopted(store):
    assert serve_from_adopted(store, missing(0, 1)).equals(missing(0, 1))
    assert held_of(store, 0, 1) == {}
    assert not store.places[0].directory.exists()


def test_nothing_missing_is_nothing_to_serve(store):
    adopt(store, adoption())
    assert len(serve_from_adopted(store, MISSING.empty_table())) == 0


def test_each_row_is_taken_from_the_first_that_has_it(store, place):
    Store([place], OLDEST).publish([row(OLDEST, number) for number in (5, 6, 7)])
    adopt(store, adoption())
    adopt(store, adoption(OLDEST))
    held = {OLD.reference_id: [2, 4], OLDEST.reference_id: [1, 3]}
    assert held_of(store, 9, 7, 5, 6, 0) == held
    assert held_of(store, 5, 6) == {OLD.reference_id: [0], OLDEST.reference_id: [1]}
    assert held_of(store, 5, 0) == {OLD.reference_id: [0, 1]}
    assert serve_from_adopted(store, missing(9, 7, 5, 6, 0)).equals(missing(9))
    lookup = store.lookup(missing(9, 7, 5, 6, 0)["key"].combine_chunks())
    assert {by: at.tolist() for by, at in lookup.held_from_adopted().items()} == held


def test_what_the_adopted_one_took_over_itself_is_not_passed_on(store, place):
    """The sample that was compared was of its own scores."""
    middle = Store([place], OLD)
    Store([place], OLDEST).publish([row(OLDEST, 20)])
    adopt(middle, adoption(OLDEST, OLD))
    asked = missing(20, 1)
    theirs = asked.set_column(0, "key", pa.array([row(OLD, 20).key, row(OLD, 1).key], pa.binary(32)))
    assert len(serve_from_adopted(middle, theirs.cast(MISSING).slice(0, 1))) == 0
    adopt(store, adoption())
    assert serve_from_adopted(store, asked).equals(missing(20))
    adopt(store, adoption(OLDEST))
    assert len(serve_from_adopted(store, missing(20))) == 0


def test_a_later_adoption_takes_the_place_of_the_earlier(store, caplog):
    adopt(store, adoption())
    adopt(store, dataclasses.replace(adoption(), date="2027-01-01T00:00:00+00:00"))
    assert [one.date[:4] for one in adoptions(store).values()] == ["2027"]
    assert not caplog.records  # a record that is written anew was not damaged


def test_adoptions_of_every_place_count_and_the_first_is_written(store, place, tmp_path):
    adopt(store, adoption())
    both = Store([str(tmp_path / "own"), place], NEW)
    assert list(adoptions(both)) == [OLD.reference_id]
    assert len(serve_from_adopted(both, missing(3))) == 0
    assert len(shard_files(tmp_path / "own" / NEW.reference_id)) == 1
    with pytest.raises(DataError, match="records 0 adoptions"):
        revoke(both, OLD.reference_id)


def test_taken_back_it_serves_nothing_and_what_it_brought_is_gone(store, place):
    Store([place], OLDEST).publish([row(OLDEST, 7)])
    adopt(store, adoption())
    adopt(store, adoption(OLDEST))
    store.publish([row(NEW, 30)])
    serve_from_adopted(store, missing(1, 2, 7))
    with pytest.raises(DataError, match="records 2 adoptions"):
        revoke(store, "")
    assert revoke(store, OLD.reference_id[:9]) == (OLD.reference_id, 2)
    assert list(adoptions(store)) == [OLDEST.reference_id]
    assert store.lookup(missing(1, 2, 7, 30)["key"].combine_chunks()).missing.tolist() == [0, 1]
    assert len(Store([place], OLD).lookup(pa.array([row(OLD, 1).key], pa.binary(32))).held) == 1


def _of_another_reference(record):
    record[OLD.reference_id] = adoption(OLD, OLDEST).described()


def _under_another_id(record):
    record[OLDEST.reference_id] = record.pop(OLD.reference_id)


def _of_another_model(record):
    other = dataclasses.replace(OLD, model=ModelIdentity({"w": "01"}, {}))
    del record[OLD.reference_id]
    record[other.reference_id] = adoption(other).described()


def _without_figures(record):
    record[OLD.reference_id]["figures"] = {}


def _no_record(record):
    record[OLD.reference_id] = "yes"


@pytest.mark.parametrize(
    "spoil", [_of_another_reference, _under_another_id, _of_another_model, _without_figures, _no_record]
)
def test_a_record_that_no_adoption_wrote_is_not_believed(store, spoil, caplog):
    adopt(store, adoption())
    path = store.places[0].directory / "adopted.json"
    record = json.loads(path.read_text())
    spoil(record)
    path.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        assert serve_from_adopted(store, missing(1)).equals(missing(1))
    assert "adopted.json" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\0" * 9])
def test_a_damaged_record_serves_nothing_and_can_be_written_anew(store, content):
    adopt(store, adoption())
    (store.places[0].directory / "adopted.json").write_text(content)
    assert adoptions(store) == {}
    adopt(store, adoption())
    assert list(adoptions(store)) == [OLD.reference_id]


def test_damage_in_the_adopted_shard_is_still_missing(store, place):
    adopt(store, adoption())
    (shard,) = shard_files(store.of(OLD).places[0].directory)
    shard.write_bytes(shard.read_bytes()[:-200] + b"\0" * 200)
    assert serve_from_adopted(store, missing(1)).equals(missing(1))


def test_a_copy_says_whose_scores_it_holds(store, place, tmp_path):
    adopt(store, adoption())
    serve_from_adopted(store, missing(1, 2))
    keys = missing(1, 2)["key"].combine_chunks()
    copy_shards(place, str(tmp_path / "whole"), [NEW])
    copy_rows(keys, place, str(tmp_path / "rows"), NEW)
    for copy in ("whole", "rows"):
        held = Store([str(tmp_path / copy)], NEW).lookup(keys).held_from_adopted()
        assert {by: at.tolist() for by, at in held.items()} == {OLD.reference_id: [0, 1]}


def test_at_a_url_too(tmp_path):
    url = f"memory://{tmp_path.name}"
    Store([url], OLD).publish([row(OLD, 1)])
    store = Store([url], NEW)
    adopt(store, adoption())
    assert list(recorded(store.places[0], NEW.reference_id)) == [OLD.reference_id]
    assert len(serve_from_adopted(store, missing(1))) == 0
    assert revoke(store, OLD.reference_id) == (OLD.reference_id, 1)
    assert serve_from_adopted(store, missing(1)).equals(missing(1))
