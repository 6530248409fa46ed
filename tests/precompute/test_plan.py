"""Scores that cannot be true never reach the store; every missing sequence is asked for once."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts.schemas import DROPPED, MISSING, PAIRS
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.files import load_config
from pipeline.errors import CheckError, DataError
from pipeline.pairs import table as pair_table
from pipeline.pairs.reading import ranges
from pipeline.pairs.tokenised import assembly, making
from pipeline.precompute import plan as plan_module
from pipeline.precompute.join import dropped_with, joined, write_joined
from pipeline.precompute.plan import Planning, make_plan
from pipeline.precompute.score import lengths_in, requests_in, sorted_shards, tokens_in
from pipeline.precompute.score import shards_of as shards_of_tables
from pipeline.store.adoption import Adoption, adopt
from pipeline.store.identity import keys_of, score_key
from pipeline.store.store import Scored
from tests.conftest import experiment, preference_rows, write_rows
from tests.precompute.scoring import lengthened, score_all, tables_of


@pytest.fixture(params=[2048, 4], ids=["one row group", "small row groups"])
def _small_groups(request, monkeypatch):
    """What is found by row must not depend on where a row group ends."""
    monkeypatch.setattr(pair_table, "GROUP", request.param)


@pytest.fixture
def config(_small_groups, tmp_path, tiny_model):
    rows = preference_rows(6)
    # two pairs share a sequence
    rows.append(rows[0] | {"rejected": "Never."})
    return load_config(experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows)))


class Engine:
    """Scores by the ids alone; `spoil` changes an answer."""

    def __init__(self, spoil=lambda logps: logps):
        self.spoil, self.asked = spoil, []

    def score(self, sequences):
        self.asked += sequences
        return [self.spoil(-np.asarray(item.response_ids, dtype=np.float32) / 100) for item in sequences]


def test_responses_without_an_end_are_counted(tmp_path, tiny_model):
    rows = preference_rows(6)
    rows[0] |= {"chosen_cut_off": True, "rejected_cut_off": True}
    rows[1] |= {"rejected_cut_off": True}
    config = load_config(experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows)))
    assert "cut off   3 of 12 responses, which are given no end token" in make_plan(config).lines()


def test_every_missing_sequence_is_scored_once_and_joined_to_its_pairs(config):
    plan = make_plan(config)
    assert (len(plan.keys), plan.sequences, len(plan.missing)) == (14, 13, 13)
    engine = Engine()
    score_all(plan, engine)
    assert len(engine.asked) == 13
    for row in pa.concat_tables(joined(plan)).to_pylist():
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_token_logps"] == pytest.approx([-token / 100 for token in row[f"{side}_ids"]])
            assert row[f"ref_{side}_logps"] == pytest.approx(-sum(row[f"{side}_ids"]) / 100)
    again = make_plan(config)
    assert (again.sequences, len(again.missing)) == (13, 0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda logps: logps[:-1], "values for"),
        (lambda logps: np.append(logps, -1), "values for"),
        (lambda logps: np.where(np.arange(len(logps)) == 1, np.nan, logps), "value 1 is not finite"),
        (lambda logps: logps + 10, "above 0"),
    ],
)
def test_an_engine_that_answers_nonsense_is_stopped(config, spoil, said):
    plan = make_plan(config)
    with pytest.raises(CheckError, match=said):
        score_all(plan, Engine(spoil))
    assert len(make_plan(config).missing) == 13


@pytest.mark.parametrize(("position", "side"), [(3, "rejected"), (10, "chosen")])
def test_scores_of_another_number_of_tokens_are_refused(config, position, side, tmp_path):
    plan = scored_plan(config)
    lengthened(plan, position, tmp_path / "lengths")
    pair_id, tokens = plan.row(position // 2)["pair_id"], plan.pairs.response_tokens[position]
    with pytest.raises(CheckError, match=f"{side} of pair {pair_id} has {tokens} tokens but {tokens - 1} scores"):
        list(joined(plan))


def scored_plan(config, spoil=lambda logps: logps):
    plan = make_plan(config)
    score_all(plan, Engine(spoil))
    return plan


def test_a_score_that_is_gone_after_scoring_is_named(config):
    plan = make_plan(config)
    ids = [plan.row(number)["pair_id"] for number in range(7)]
    with pytest.raises(CheckError, match="14 scores are missing") as stop:
        list(joined(plan))
    # the first ten: two of each pair
    named = ", ".join(pair_id for pair_id in ids[:5] for _ in range(2))
    assert f"first of the pairs {named}:" in str(stop.value)


def test_without_scores_the_pairs_are_the_same_and_the_store_is_not_asked(config, monkeypatch):
    plan = scored_plan(config)
    with_scores = pa.concat_tables(joined(plan))
    monkeypatch.setattr(type(plan.store), "lookup", lambda *_: pytest.fail("asked"))
    without = pa.concat_tables(joined(plan, scored=False))
    assert without.schema == with_scores.schema == PAIRS
    scores = [f"ref_{side}_{what}" for side in ("chosen", "rejected") for what in ("token_logps", "logps")]
    assert without.drop(scores).equals(with_scores.drop(scores))
    assert all(without[name].null_count == 7 for name in scores)


@pytest.mark.parametrize("numbers", [[0], [3], [4], [6], [0, 3, 4, 5], list(range(7))])
def test_pairs_that_are_left_out_are_gone_and_the_others_unmoved(config, numbers):
    plan = scored_plan(config)
    every = pa.concat_tables(joined(plan))
    kept = pa.array([number for number in range(7) if number not in numbers], pa.int64())
    assert pa.concat_tables(joined(plan, left_out=dict.fromkeys(numbers, "why"))).equals(every.take(kept))
    unscored = pa.concat_tables(joined(plan, scored=False, left_out=numbers))
    assert unscored["pair_id"].equals(every.take(kept)["pair_id"])


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_only_pairs_that_are_left_out_may_lack_a_score(config, side):
    plan = make_plan(config)
    missing = plan.row(3)[f"{side}_ids"]
    # -inf: computed, and no number; so it is not stored
    score_all(plan, Engine(infinite(len(missing))))
    lacking = [
        number
        for number in range(7)
        for side in ("chosen", "rejected")
        if len(plan.row(number)[f"{side}_ids"]) == len(missing)
    ]
    assert len(set(lacking)) < 7
    left_out = dict.fromkeys(lacking, "value 0")
    assert sum(map(len, joined(plan, left_out=left_out))) == 7 - len(left_out)
    for spared in lacking:
        with pytest.raises(CheckError, match=f"of the pairs {plan.row(spared)['pair_id']}"):
            list(joined(plan, left_out=left_out.keys() - {spared}))


def test_a_single_pair_is_joined(config):
    write_rows(Path(config.data.path[0]), preference_rows(1))
    (table,) = joined(scored_plan(config))
    assert len(table) == 1
    assert table["ref_chosen_token_logps"].null_count == 0


def infinite(length):
    return lambda logps: np.where(len(logps) == length, -np.inf, logps).astype(np.float32)


def test_the_file_holds_the_joined_pairs_and_what_it_says_of_itself(config, tmp_path):
    plan = scored_plan(config)
    path = tmp_path / "pairs.parquet"
    for left_out in ([], [2, 5]):
        write_joined(path, plan, {"k": [1]}, left_out=left_out)
        assert read_table(path, PAIRS).equals(pa.concat_tables(joined(plan, left_out=left_out)))
        assert read_about(path)["k"] == [1]
    write_joined(path, plan, {}, scored=False)
    assert read_table(path, PAIRS).equals(pa.concat_tables(joined(plan, scored=False)))
    assert [one.name for one in tmp_path.iterdir() if "pairs" in one.name] == ["pairs.parquet"]


def test_what_scoring_left_out_stands_with_what_planning_dropped(config):
    write_rows(Path(config.data.path[0]), [*preference_rows(6), {"prompt": "Hi?", "chosen": "", "rejected": "x"}])
    plan = make_plan(config)
    first, *rest = dropped_with(plan, {4: "chosen: late", 1: "rejected: early"}).to_pylist()
    assert first["reason"] == "empty_response"
    for row, number, detail in zip(rest, (1, 4), ("rejected: early", "chosen: late"), strict=True):
        pair = plan.row(number)
        assert row == {
            **{name: pair.get(name) for name in DROPPED.names},
            "reason": "not_finite",
            "detail": detail,
        }
        assert row["prompt_ids"] == pair["prompt_ids"]
    assert dropped_with(plan, {}).schema == DROPPED


def shards_of(plan, tokens, first):
    return list(sorted_shards(pa.concat_tables(tables_of(plan)), tokens, first))


def test_the_first_shard_may_be_smaller_and_all_is_in_one(config):
    plan = make_plan(config)
    shards = shards_of(plan, 150, 40)
    sizes = [tokens_in(shard) for shard in shards]
    assert sizes[0] <= 40 or len(shards[0]) == 1
    assert max(sizes[1:]) > 40
    keys = [key for shard in shards for key in shard["key"].to_pylist()]
    assert sorted(keys) == sorted(plan.keys.take(pa.array(plan.missing)).to_pylist())


def test_shards_keep_a_prompts_responses_together_longest_first_within_their_budget(config):
    plan = make_plan(config)
    shards = [requests_in(shard) for shard in shards_of(plan, 150, 150)]
    assert len(shards) > 1
    assert all(sum(map(len, shard)) <= 150 or len(shard) == 1 for shard in shards)
    prompts = [tuple(one.prompt_ids) for shard in shards for one in shard]
    # every prompt is one run of neighbours
    assert sum(a != b for a, b in pairwise(prompts)) + 1 == len(set(prompts))
    longest = dict.fromkeys(prompts, 0)
    for shard in shards:
        for one in shard:
            longest[tuple(one.prompt_ids)] = max(longest[tuple(one.prompt_ids)], len(one))
    assert list(longest.values()) == sorted(longest.values(), reverse=True)


def test_windows_that_lack_little_fill_shards_together(config):
    reference = config.reference.model_copy(update={"tokens_per_shard": 150})
    plan = make_plan(config.model_copy(update={"reference": reference}))
    rows = pa.concat_tables(tables_of(plan))
    single = [rows.slice(row, 1) for row in range(len(rows))]
    shards = list(shards_of_tables(plan.reference, iter(single)))
    assert len(shards) < len(single)
    assert sorted(pa.concat_tables(shards)["key"].to_pylist()) == sorted(rows["key"].to_pylist())
    # of four shards' worth at a time, each sorted for itself
    (first, *_) = shards
    fit = next(number for number in range(1, 14) if tokens_in(rows.slice(0, number)) >= 4 * 150)
    assert lengths_in(first)[0] == max(lengths_in(rows.slice(0, fit)))


@pytest.fixture
def in_ranges(monkeypatch):
    """Ranges of a few rows, and a window after each."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 400)
    monkeypatch.setattr(assembly, "WINDOW", 2)


@pytest.mark.usefixtures("in_ranges")
def test_windows_have_what_is_missing_once_in_the_order_of_the_data(config):
    rows = preference_rows(20)
    write_rows(Path(config.data.path[0]), [*rows, *(row | {"rejected": "Never."} for row in rows[:7]), rows[3]])
    planning = Planning(config)
    windows = list(planning.windows())
    plan = planning.plan()
    assert len(windows) > 3
    assert pa.concat_tables(one.missing for one in windows)["key"].to_pylist() == [
        plan.keys[position].as_py() for position in plan.missing.tolist()
    ]
    for window in windows:
        for row in window.missing.to_pylist():
            assert row["key"] == score_key(plan.identity.reference_id, row["prompt_ids"], row["response_ids"])
    shares = [one.share for one in windows]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert 0 < shares[0] < 0.5
    assert make_plan(config).lines() == plan.lines()


@pytest.mark.usefixtures("in_ranges")
@pytest.mark.parametrize("at_once", [1, 6, 25])
@pytest.mark.parametrize("windows_first", [True, False])
def test_what_the_store_is_asked_in_pieces_is_what_it_would_be_asked_at_once(
    config, monkeypatch, at_once, windows_first
):
    rows = preference_rows(20)
    write_rows(Path(config.data.path[0]), [*rows, *(row | {"rejected": "Never."} for row in rows[:7]), rows[3]])
    whole = make_plan(config)
    older = replace(whole.identity, numerics=replace(whole.identity.numerics, engine_version="0.1"))
    figures = {"mean_absolute_difference": 1e-6}
    adopt(whole.store, Adoption(older, whole.identity, figures, figures, "2026-01-02T03:04:05+00:00"))
    logps = {position: np.full(len(whole.request(position).response_ids), -1, np.float32) for position in range(47)}
    for reference, positions in ((whole.identity, (0, 1, 20, 37)), (older, (2, 3, 23, 40))):
        (keys,) = [keys_of(reference.reference_id, table) for table in [asked_at(whole, positions)]]
        whole.store.of(reference).publish(
            [
                Scored(key, len(whole.request(position).prompt_ids), logps[position])
                for key, position in zip(keys.to_pylist(), positions, strict=True)
            ]
        )
    at_once_plan = make_plan(config)
    assert at_once_plan.adopted[older.reference_id].tolist() == [2, 3, 23]
    monkeypatch.setattr(plan_module, "_ASKED_AT_ONCE", at_once)
    planning = Planning(config)
    if windows_first:
        list(planning.windows())
    plan = planning.plan()
    assert plan.lines() == at_once_plan.lines()
    assert plan.sequences == at_once_plan.sequences == 47
    np.testing.assert_array_equal(plan.missing, at_once_plan.missing)
    assert {by: held.tolist() for by, held in plan.adopted.items()} == {older.reference_id: [2, 3, 23]}


def asked_at(plan, positions):
    requests = [plan.request(position) for position in positions]
    columns = [
        plan.keys.take(pa.array(positions)),
        [one.prompt_ids for one in requests],
        [one.response_ids for one in requests],
    ]
    return pa.table(columns, schema=MISSING)


@pytest.mark.usefixtures("in_ranges")
def test_a_window_comes_before_later_rows_are_tokenised(config, monkeypatch):
    monkeypatch.setattr(plan_module, "_LISTED_WITHIN", 0)
    write_rows(Path(config.data.path[0]), preference_rows(20))
    made, real = [], making._make
    monkeypatch.setattr(making, "_make", lambda *given: made.append(given) or real(*given))
    planning = Planning(config)
    windows = planning.windows()
    first = next(windows)
    assert len(made) == 1
    assert len(first.missing) >= 4
    # what is scored meanwhile is no longer missing, and what was read is not read again
    score_all(make_plan(config), Engine())
    before = len(made)
    assert not any(len(window.missing) for window in windows)
    assert not len(planning.plan().missing)
    assert len(made) == before


@pytest.mark.usefixtures("in_ranges")
def test_the_whole_plan_may_be_asked_for_between_windows(config):
    write_rows(Path(config.data.path[0]), preference_rows(20))
    planning = Planning(config)
    windows = planning.windows()
    first = next(windows)
    plan = planning.plan()
    rest = list(windows)
    assert sum(len(window.missing) for window in [first, *rest]) == len(plan.missing) == 40
    assert planning.plan() is plan
    # asked for again they are the same
    assert [len(window.missing) for window in planning.windows()] == [len(window.missing) for window in [first, *rest]]


@pytest.mark.usefixtures("in_ranges")
def test_what_cannot_be_read_is_said_behind_the_windows_before_it(config):
    path = write_rows(Path(config.data.path[0]), preference_rows(20))
    path.write_text(path.read_text() + "{broken\n")
    planning = Planning(config)
    windows = planning.windows()
    assert len(next(windows).missing)
    with pytest.raises(DataError, match=r"line 21, column 2: not valid JSON"):
        list(windows)
    # of rows that were not all read there is no plan
    with pytest.raises(DataError, match="line 21"):
        planning.plan()
    write_rows(path, [{"prompt": f"{at}?", "chosen": "", "rejected": "x"} for at in range(20)])
    with pytest.raises(DataError, match=r"no pair is left to train on from .*\(20 x empty_response\)"):
        list(Planning(config).windows())
