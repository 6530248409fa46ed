"""`refscore store adopt`: an engine is updated, its numbers hardly change, and nothing is scored again."""

import json
import shutil

import numpy as np
import polars as pl
import pytest

from pipeline.artifacts.tables import read_about
from pipeline.engines import protocol
from tests import forked
from tests.conftest import (
    experiment,
    make_tiny_model,
    preference_rows,
    refscore_here,
    write_rows,
)


def stage_of(where, run):
    """What provenance.json says of a run's scores."""
    return json.loads((where / f"data/runs/{run}/provenance.json").read_text())["stages"]["precompute"]


def records(where, reference):
    """What is adopted for a reference, by the adopted one's id."""
    found = (where / f"data/store/{reference}").glob("adopted-*.json")
    return {file.stem.removeprefix("adopted-"): json.loads(file.read_text()) for file in found}


@pytest.fixture
def config(tmp_path, tiny_model):
    return experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(12)))


@pytest.fixture
def updated(monkeypatch):
    """Has another version of the engine installed, which computes the same."""
    return lambda version: monkeypatch.setattr(protocol, "engine_version", lambda engine: version)


@pytest.fixture
def old(tmp_path, config, updated):
    """The id of the reference of the run `old`, which an earlier version scored."""
    updated("4.0")
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "old")
    updated("5.0")
    return stage_of(tmp_path, "old")["reference_id"]


def test_after_an_update_nothing_is_scored_again(tmp_path, config, old, updated, monkeypatch):
    assert "24 misses" in refscore_here(tmp_path, "precompute", "--config", config, "--plan")
    said = refscore_here(tmp_path, "store", "adopt", old[:12], "--config", config, "--sample", 8)
    assert "Earlier minus today, 8 pairs" in said
    assert "margin noise" in said
    assert f"adopted   scores of {old[:12]} now stand for those of" in said
    plan = refscore_here(tmp_path, "precompute", "--config", config, "--plan")
    assert f"24 sequences: 0 hits, 24 adopted from {old[:12]}, 0 misses, 0 tokens to score" in plan
    forecast = refscore_here(
        tmp_path, "plan", "--config", config, "--json", "--scoring-speed", 1, "--training-speed", 1
    )
    forecast = json.loads(forecast[forecast.index("\n{") :])
    assert (forecast["hits"], forecast["adopted"], forecast["misses"]) == (0, {old: 24}, 0)

    monkeypatch.setattr("pipeline.engines.reference.start_scorer", lambda *_: pytest.fail("an engine was started"))
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    new = stage_of(tmp_path, "new")
    assert new["reference_id"] != old
    assert (new["scored"], new["computed_by"]) == (0, {old: 24})
    assert stage_of(tmp_path, "old")["computed_by"] == {}
    runs = tmp_path / "data/runs"
    assert read_about(runs / "new/pairs.parquet")["computed_by"] == {old: 24}
    assert "computed_by" not in read_about(runs / "old/pairs.parquet")
    assert pl.read_parquet(runs / "new/pairs.parquet").equals(pl.read_parquet(runs / "old/pairs.parquet"))
    refscore_here(tmp_path, "export", "--run", "new", "--format", "jsonl", "--to", "exported")
    card = (tmp_path / "exported/README.md").read_text()
    assert f"by refscore; 24 sequences by another version of the engine, reference `{old}`. Its id" in card
    monkeypatch.undo()
    verified = refscore_here(tmp_path, "verify", "--run", "new", "--rows", 4)
    assert f"24 sequences of the run were computed by {old[:12]}, which was adopted" in verified
    assert json.loads((runs / "new/verify.json").read_text())["computed_by"] == {old: 24}
    updated("5.0")
    # what was taken over is there now, and sound; it is said where it comes from
    assert "24 hits, 0 misses" in refscore_here(tmp_path, "precompute", "--config", config, "--plan")
    assert "0 damaged" in refscore_here(tmp_path, "store", "verify")
    assert f"{new['reference_id'][:12]} adopted from {old[:12]} (transformers transformers 4.0" in refscore_here(
        tmp_path, "store", "ls"
    )


def test_training_takes_over_what_was_adopted(tmp_path, config, old):
    refscore_here(tmp_path, "store", "adopt", old, "--config", config)
    said = refscore_here(tmp_path, "train", "--config", config, "--run", "new")
    assert f"24 adopted from {old[:12]}" in said
    assert "gate      passed" in said


def test_other_commands_take_over_what_was_adopted(tmp_path, config, old):
    refscore_here(tmp_path, "store", "adopt", old, "--config", config)
    said = refscore_here(tmp_path, "store", "explain", "--config", config)
    assert f"0 hits, 24 adopted from {old[:12]}, 0 misses" in said
    said = refscore_here(tmp_path, "store", "explain", "--config", config, "--row", 3)
    assert f"0 hits, 2 adopted from {old[:12]}, 0 misses" in said
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in preference_rows(14)]
    asked = write_rows(tmp_path / "responses.jsonl", [*rows, rows[0]])
    out = tmp_path / "scores.parquet"
    said = refscore_here(tmp_path, "score", asked, "--out", out, "--config", config)
    assert "15 rows: 0 hits, 12 adopted, 2 scored, 0 with a problem" in said
    assert f"12 of these sequences were computed by {old[:12]}, which was adopted" in said
    said = refscore_here(tmp_path, "score", asked, "--out", tmp_path / "again.parquet", "--config", config)
    assert "15 rows: 14 hits, 0 scored" in said
    assert f"12 of these sequences were computed by {old[:12]}, which was adopted" in said
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    pairs = pl.read_parquet(tmp_path / "data/runs/old/pairs.parquet")
    known = dict(zip(pairs["chosen"], pairs["ref_chosen_logps"], strict=True))
    assert [known[row["response"]] for row in rows[:12]] == scores["logp"][:12].to_list()


def test_what_is_damaged_is_not_in_the_sample(tmp_path, config, updated):
    updated("4.0")
    small = ["--config", config, "--set", "reference.tokens_per_shard=150"]
    refscore_here(tmp_path, "precompute", *small, "--run", "old")
    updated("5.0")
    old = stage_of(tmp_path, "old")["reference_id"]
    first, *others = sorted((tmp_path / "data/store" / old).glob("scores-*.parquet"))
    assert others
    content = bytearray(first.read_bytes())
    content[100] ^= 1
    first.write_bytes(content)
    said = refscore_here(tmp_path, "store", "adopt", old, *small, "--sample", 12)
    assert "it computed no more than" in said
    assert "a sample of 12 says more" in said
    assert f"adopted   scores of {old[:12]}" in said


def test_the_sample_is_of_pairs_that_were_scored_whole(tmp_path, tiny_model, old):
    rows = preference_rows(12)
    others = [{**row, "rejected": f"{row['rejected']} no"} for row in rows[:5]]
    half = experiment(tmp_path, tiny_model, write_rows(tmp_path / "half.jsonl", [*others, *rows[5:]]))
    said = refscore_here(tmp_path, "store", "adopt", old, "--config", half, "--sample", 12)
    assert "it computed no more than 7 pairs of this data" in said


def test_an_explanation_names_the_way_out(tmp_path, config, old):
    said = refscore_here(tmp_path, "store", "explain", "--config", config)
    assert "numerics: engine_version 'transformers 4.0" in said
    assert f"'refscore store adopt {old[:12]}' lets its scores stand for these" in said
    other = refscore_here(tmp_path, "store", "explain", "--config", config, "--set", "reference.dtype=bfloat16")
    assert "store adopt" not in other


def test_what_the_earlier_engine_never_scored_is_scored(tmp_path, tiny_model, config, old):
    refscore_here(tmp_path, "store", "adopt", old, "--config", config)
    more = experiment(tmp_path, tiny_model, write_rows(tmp_path / "more.jsonl", preference_rows(15)))
    assert f"24 adopted from {old[:12]}, 6 misses" in refscore_here(tmp_path, "precompute", "--config", more, "--plan")
    refscore_here(tmp_path, "precompute", "--config", more, "--run", "new")
    new = stage_of(tmp_path, "new")
    assert (new["sequences"], new["scored"], new["computed_by"]) == (30, 6, {old: 24})


@pytest.mark.parametrize(
    ("before", "now", "tight"), [("float32", "bfloat16", ["--tolerance", 0.0001]), ("bfloat16", "float32", [])]
)
def test_another_dtype_is_refused_under_a_tight_tolerance(tmp_path, config, before, now, tight):
    asked = ["--config", config, "--set", f"reference.dtype={before}"]
    refscore_here(tmp_path, "precompute", *asked, "--run", "old")
    reference = stage_of(tmp_path, "old")["reference_id"]
    asked[-1] = f"reference.dtype={now}"
    said = refscore_here(tmp_path, "store", "adopt", reference[:8], *asked, *tight, code=4)
    assert "not adopted" in said
    assert "mean absolute difference" in said
    assert not list((tmp_path / "data/store").rglob("adopted-*.json"))
    assert "24 misses" in refscore_here(tmp_path, "precompute", *asked, "--plan")
    # a looser one is the user's to give
    refscore_here(tmp_path, "store", "adopt", reference[:8], *asked, "--tolerance", 1)
    assert f"24 adopted from {reference[:12]}" in refscore_here(tmp_path, "precompute", *asked, "--plan")


def test_a_second_time_renews_the_record(tmp_path, config, old):
    refscore_here(tmp_path, "store", "adopt", old, "--config", config, "--sample", 2)
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    new = stage_of(tmp_path, "new")["reference_id"]
    first = records(tmp_path, new)[old]
    refscore_here(tmp_path, "store", "adopt", old, "--config", config, "--sample", 4, "--tolerance", 0.5)
    second = records(tmp_path, new)[old]
    assert list(records(tmp_path, new)) == [old]
    assert second["figures"]["tokens"] > first["figures"]["tokens"]
    assert (first["tolerance"]["mean_absolute_difference"], second["tolerance"]["mean_absolute_difference"]) == (
        0.002,
        0.5,
    )
    assert second["adopted"]["numerics"]["engine_version"].startswith("transformers 4.0")
    assert second["by"]["numerics"]["engine_version"].startswith("transformers 5.0")


def test_an_adoption_is_taken_back_with_what_it_brought(tmp_path, config, old):
    refscore_here(tmp_path, "store", "adopt", old, "--config", config)
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    shutil.rmtree(tmp_path / "data/store" / old)  # also if the adopted one is gone
    said = refscore_here(tmp_path, "store", "adopt", old[:9], "--config", config, "--revoke")
    assert "24 sequences that were taken over are removed" in said
    assert (
        f"made with them: new; 'refscore precompute' of such a run scores anew what its pairs had from {old[:12]}"
        in said
    )
    assert "records the same" not in said
    assert "0 hits, 24 misses" in refscore_here(tmp_path, "precompute", "--config", config, "--plan")
    assert "records 0 adoptions" in refscore_here(
        tmp_path, "store", "adopt", old, "--config", config, "--revoke", code=3
    )
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    assert stage_of(tmp_path, "new")["computed_by"] == {}


def test_what_may_not_be_adopted_is_refused_before_anything_is_scored(tmp_path, config, old, monkeypatch):
    monkeypatch.setattr("pipeline.engines.reference.start_scorer", lambda *_: pytest.fail("an engine was started"))

    def refused(reference, code, *options):
        return refscore_here(tmp_path, "store", "adopt", reference, "--config", config, *options, code=code)

    other = make_tiny_model(tmp_path / "other", seed=1)
    said = refused(old, 2, "--set", f"reference.model={other}")
    assert "is another model" in said
    assert "weights of" in said
    assert "numerics" not in said
    assert "no reference begins with 'ffff'" in refused("ffff", 3)
    assert "compares nothing with the reference" in refused(old, 2, "--set", "train.loss_type=[simpo]")
    assert "a number of nats per token" in refused(old, 2, "--tolerance", "inf")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.store.local_places.LocalPlace.why_not_writable", lambda self: "it is full")
        assert "first place of reference.store, which cannot be written (it is full)" in refused(old, 1)
    new = write_rows(tmp_path / "new.jsonl", [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(8)])
    assert "computed no score of this configuration's data" in refused(old, 3, "--set", f"data.path={new}")
    monkeypatch.setattr(protocol, "engine_version", lambda engine: "4.0")
    assert "own reference" in refused(old, 2)


def test_single_responses_are_compared_too(tmp_path, config, updated):
    kto = ["--config", config, "--set", "train.loss_type=kto"]
    updated("4.0")
    refscore_here(tmp_path, "precompute", *kto, "--run", "old")
    updated("5.0")
    old = stage_of(tmp_path, "old")["reference_id"]
    assert "Earlier minus today, 5 responses" in refscore_here(tmp_path, "store", "adopt", old, *kto, "--sample", 5)
    sequences = stage_of(tmp_path, "old")["sequences"]
    refscore_here(tmp_path, "precompute", *kto, "--run", "new")
    assert stage_of(tmp_path, "new")["computed_by"] == {old: sequences}


def test_an_id_that_two_references_begin_with_is_refused(tmp_path, config, old):
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    assert "2 references begin with ''" in refscore_here(tmp_path, "store", "adopt", "", "--config", config, code=3)


@pytest.mark.engine
def test_scores_of_vllm_stand_for_those_of_transformers(tmp_path, config):
    vllm = ["--config", config, "--set", "reference.engine=vllm", "--run", "old"]
    forked.refscore(tmp_path, "precompute", *vllm)
    old = stage_of(tmp_path, "old")["reference_id"]
    said = refscore_here(tmp_path, "store", "adopt", old, "--config", config)
    assert "Earlier minus today, 12 pairs" in said
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "new")
    new = stage_of(tmp_path, "new")
    assert (new["scored"], new["computed_by"]) == (0, {old: 24})
    difference = records(tmp_path, new["reference_id"])[old]["figures"]["max_absolute_difference"]
    assert 0 < difference < 1e-3
    assert np.isfinite(difference)
