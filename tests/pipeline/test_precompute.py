"""Scores that cannot be true never reach the store; every missing sequence is asked for once."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipeline import join, pair_table, precompute
from pipeline.config_file import load_config
from pipeline.errors import CheckError
from pipeline.join import joined
from pipeline.precompute import make_plan, score_missing, shards_of
from tests.conftest import experiment, preference_rows, write_rows


@pytest.fixture(params=[2048, 4], ids=["one row group", "small row groups"])
def _small_groups(request, monkeypatch):
    """What is found by row must not depend on where a row group ends."""
    for module in (pair_table, join):
        monkeypatch.setattr(module, "GROUP", request.param)
    monkeypatch.setattr(precompute, "_WINDOW", request.param * 4)


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


def test_every_missing_sequence_is_scored_once_and_joined_to_its_pairs(config):
    plan = make_plan(config)
    assert (len(plan.keys), plan.sequences, len(plan.missing)) == (14, 13, 13)
    engine = Engine()
    score_missing(plan, config.reference, engine, lambda sequences, tokens: None)
    assert len(engine.asked) == 13
    for row in pa.concat_tables(joined(plan)).to_pylist():
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_logps"] == pytest.approx([-token / 100 for token in row[f"{side}_ids"]])
            assert row[f"ref_{side}_logp"] == pytest.approx(-sum(row[f"{side}_ids"]) / 100)
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
        score_missing(plan, config.reference, Engine(spoil), lambda sequences, tokens: None)
    assert len(make_plan(config).missing) == 13


def test_however_few_scores_are_held_at_a_time_the_pairs_are_the_same(config, monkeypatch):
    plan = make_plan(config)
    score_missing(plan, config.reference, Engine(), lambda sequences, tokens: None)
    together = pa.concat_tables(joined(plan))
    monkeypatch.setattr("pipeline.join._AT_ONCE", 1)
    assert pa.concat_tables(joined(plan)).equals(together)


def test_scores_of_another_number_of_tokens_are_refused(config):
    plan = make_plan(config)
    score_missing(plan, config.reference, Engine(), lambda sequences, tokens: None)
    plan.pairs.response_tokens[3] += 1
    with pytest.raises(CheckError, match=r"rejected of pair .* tokens but"):
        list(joined(plan))


def test_a_score_that_is_gone_after_scoring_is_named(config):
    plan = make_plan(config)
    with pytest.raises(CheckError, match="14 scores are missing"):
        list(joined(plan))


def test_the_first_shard_may_be_smaller_and_all_is_in_one(config):
    plan = make_plan(config)
    shards = list(shards_of(plan, 150, 40))
    sizes = [sum(len(request) for _, request in shard) for shard in shards]
    assert sizes[0] <= 40 or len(shards[0]) == 1
    assert max(sizes[1:]) > 40
    assert sorted(position for shard in shards for position, _ in shard) == list(plan.missing)


def test_shards_keep_a_prompts_responses_together_longest_first_within_their_budget(config):
    plan = make_plan(config)
    shards = [[request for _, request in shard] for shard in shards_of(plan, 150)]
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
