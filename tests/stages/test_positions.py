"""Sequences longer than a model has positions for are left out by both engines, and refused by the trainer, by name."""

import polars as pl
import pytest

from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows


@pytest.mark.parametrize("too_long", ["drop", "truncate_response"])
def test_the_reference_s_positions_limit_the_pairs(tmp_path, too_long):
    model = make_tiny_model(tmp_path / "short", max_position_embeddings=60)
    rows = preference_rows(8)
    rows[2]["rejected"] = "The dog ran and ran. " * 20
    config = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    arguments = ["--config", config, "--run", "one", "--set", f"data.too_long={too_long}"]
    said = refscore_here(tmp_path, "precompute", *arguments)
    pairs, dropped = (pl.read_parquet(tmp_path / f"data/runs/one/{name}.parquet") for name in ("pairs", "dropped"))
    assert len(pairs) + len(dropped) == 8
    lengths = pairs["prompt_ids"].list.len() + pl.Series(
        [max(map(len, both)) for both in pairs.select("chosen_ids", "rejected_ids").iter_rows()]
    )
    assert lengths.max() <= 60
    if too_long == "drop":
        assert "too_long" in said
        assert any("the model reads 60" in detail for detail in dropped["detail"])
    else:
        assert lengths.max() == 60


def test_a_policy_with_fewer_positions_than_the_pairs_is_refused_before_the_first_step(tmp_path, tiny_model):
    policy = make_tiny_model(tmp_path / "short", max_position_embeddings=30)
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "one")
    said = refscore_here(
        tmp_path, "train", "--config", config, "--run", "one", "--set", f"policy.model={policy}", code=2
    )
    assert "reads 30" in said
    assert not (tmp_path / "data/runs/one/metrics.parquet").exists()
