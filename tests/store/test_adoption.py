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
    Revoked,
    adopt,
    adoptions,
    held_by_adopted,
    record_of,
    recorded,
    revoke,
    serve_from_adopted,
)
from pipeline.store.identity import keys_of, score_key
from pipeline.store.shard import check_shard, shard_files
from pipeline.store.store import Scored, Store
from pipeline.store.tidying.compaction import compact
from pipeline.store.transfer import copy_rows, copy_shards
from tests.store.test_remote_places import bucket, server  # noqa: F401  # fixtures
from tests.store.test_store import REFERENCE

FIGURES = {"mean_absolute_difference": 1e-6}


def version(number):
    return dataclasses.replace(
        REFERENCE, numerics=dataclasses.replace(REFERENCE.numerics, engine_version=f"0.{number}")
    )


OLDEST, OLD, NEW = version(1), version(2), version(3)


def adoption(adopted=OLD, by=NEW, figure=1e-6):
    return Adoption(adopted, by, {"mean_absolute_difference": figure}, FIGURES, "2026-01-02T03:04:05+00:00")


def record(store, adopted=OLD):
    """The file of an adoption."""
    return store.places[0].directory / record_of(adopted.reference_id)


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


def test_each_row_is_taken_from_the_nearest_that_has_it(store, place):
    Store([place], OLDEST).publish([row(OLDEST, number) for number in (5, 6, 7)])
    adopt(store, adoption(OLDEST, figure=2e-7))
    adopt(store, adoption(figure=1e-7))
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
    assert revoke(store, OLD.reference_id[:9]) == Revoked(OLD.reference_id, 2, [])
    assert list(adoptions(store)) == [OLDEST.reference_id]
    assert store.lookup(missing(1, 2, 7, 30)["key"].combine_chunks()).missing.tolist() == [0, 1]
    assert len(Store([place], OLD).lookup(pa.array([row(OLD, 1).key], pa.binary(32))).held) == 1


def test_who_adopts_at_the_same_moment_takes_nothing_from_another(store, place, monkeypatch):
    """The other's record is written between the reading and the writing of this one's, whatever is read."""
    another, noted = Store([place], NEW), Store.note

    def noted_after_another(self, name, content):
        noted(another, record_of(OLDEST.reference_id), adoption(OLDEST).described())
        noted(self, name, content)

    monkeypatch.setattr(Store, "note", noted_after_another)
    adopt(store, adoption())
    assert adoptions(store).keys() == {OLD.reference_id, OLDEST.reference_id}


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_a_record_is_there_at_every_moment_while_it_is_renewed(where, tmp_path, monkeypatch):
    store = Store([str(tmp_path) if where == "directory" else f"memory://{tmp_path.name}"], NEW)
    adopt(store, adoption())
    place, steps = type(store.places[0]), []

    def and_then(method):
        def step(self, *arguments, **options):
            made = method(self, *arguments, **options)
            steps.append(list(adoptions(Store(store._named, NEW))))
            return made

        return step

    for name in ("remove", "publish", "write"):
        monkeypatch.setattr(place, name, and_then(getattr(place, name)))
    adopt(store, dataclasses.replace(adoption(), date="2027-01-01T00:00:00+00:00"))
    assert steps
    assert all(there == [OLD.reference_id] for there in steps)


def test_taken_back_while_shards_are_merged_nothing_of_it_is_left(store, monkeypatch):
    adopt(store, adoption())
    for number in (1, 2, 3):
        serve_from_adopted(store, missing(number))
    place, remove, merged = type(store.places[0]), type(store.places[0]).remove, []

    def merged_meanwhile(self, name):
        if name.startswith("scores-") and not merged:
            merged.append(name)
            assert compact(store, store.places[0].listed().shards) == 3
        remove(self, name)

    monkeypatch.setattr(place, "remove", merged_meanwhile)
    assert revoke(store, OLD.reference_id).rows >= 3
    assert store.lookup(missing(1, 2, 3)["key"].combine_chunks()).missing.tolist() == [0, 1, 2]


def test_a_later_place_that_records_the_same_is_named(store, place, tmp_path):
    both = Store([str(tmp_path / "own"), place], NEW)
    adopt(store, adoption())
    adopt(both, adoption())
    assert revoke(both, OLD.reference_id).elsewhere == [store.places[0].name]
    assert list(adoptions(both)) == [OLD.reference_id]


def _of_another_reference(_):
    return adoption(OLD, OLDEST).described()


def _of_another_adopted_one(_):
    return adoption(OLDEST).described()


def _of_another_model(_):
    return adoption(dataclasses.replace(OLD, model=ModelIdentity({"w": "01"}, {}))).described()


def _without_figures(content):
    return {**content, "figures": {}}


def _beyond_its_tolerance(content):
    return {**content, "figures": {"mean_absolute_difference": 2e-6}}


def _no_record(_):
    return "yes"


@pytest.mark.parametrize(
    "spoil",
    [
        _of_another_reference, _of_another_adopted_one, _of_another_model, _without_figures, _beyond_its_tolerance, _no_record,
    ],
)  # fmt: skip
def test_a_record_that_no_adoption_wrote_is_not_believed(store, spoil, caplog):
    adopt(store, adoption())
    content = spoil(json.loads(record(store).read_text()))
    record(store).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert serve_from_adopted(store, missing(1)).equals(missing(1))
    assert f"{record(store).name} is not believed" in caplog.text


@pytest.mark.parametrize("numerics", [{"engine": "imported"}, {"logps": "fixed_point"}])
def test_a_record_of_what_may_not_be_adopted_is_not_believed(numerics):
    other = dataclasses.replace(OLD, numerics=dataclasses.replace(OLD.numerics, **numerics))
    with pytest.raises(DataError, match="may not be adopted"):
        Adoption.from_described(adoption(other).described())


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\0" * 9, "\x80"])
def test_a_damaged_record_serves_nothing_and_can_be_written_anew_or_taken_back(store, content):
    adopt(store, adoption())
    adopt(store, adoption(OLDEST))
    record(store).write_bytes(content.encode("latin-1"))
    assert list(adoptions(store)) == [OLDEST.reference_id]
    adopt(store, adoption())
    assert adoptions(store).keys() == {OLD.reference_id, OLDEST.reference_id}
    record(store).write_bytes(content.encode("latin-1"))
    revoke(store, OLD.reference_id)
    assert not record(store).exists()


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


@pytest.mark.parametrize("where", ["memory", "bucket"])
def test_at_a_url_too(tmp_path, request, where):
    url = request.getfixturevalue("bucket") if where == "bucket" else f"memory://{tmp_path.name}"
    Store([url], OLD).publish([row(OLD, 1)])
    store = Store([url], NEW)
    adopt(store, adoption())
    assert list(recorded(store.places[0], NEW.reference_id)) == [OLD.reference_id]
    assert len(serve_from_adopted(store, missing(1))) == 0
    assert revoke(store, OLD.reference_id) == Revoked(OLD.reference_id, 1, [])
    assert adoptions(store) == {}
    assert serve_from_adopted(store, missing(1)).equals(missing(1))
