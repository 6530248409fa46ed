"""Where no length is given: all that the reference reads; and pairs made with the length that once was the default stay."""

import json

import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import load_config
from pipeline.precompute.pairs_file import _digest_with, is_current
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows


def long_row(words):
    return {"prompt": "Hi?", "chosen": "cat " * words, "rejected": "The dog ran."}


def config_of(tmp_path, model, rows):
    path = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    path.write_text(path.read_text().replace("  max_length: 256\n", ""))
    assert load_config(path).data.max_length is None
    return path


def test_all_that_the_reference_has_positions_for_is_kept(tmp_path, tiny_model):
    config = config_of(tmp_path, tiny_model, [*preference_rows(8), long_row(300), long_row(600)])
    refscore_here(tmp_path, "precompute", "--config", config, "--run", "r")
    pairs = pl.read_parquet(tmp_path / "data/runs/r/pairs.parquet")
    dropped = pl.read_parquet(tmp_path / "data/runs/r/dropped.parquet")
    assert pairs["chosen_ids"].list.len().max() > 256
    assert dropped["source_row"].to_list() == [9]
    assert dropped["detail"][0].endswith("the model reads 512")


def test_without_a_length_the_model_alone_decides_what_is_cut(tmp_path, tiny_model):
    config = config_of(tmp_path, tiny_model, [*preference_rows(8), long_row(600)])
    options = ("--config", config, "--run", "r", "--set", "data.too_long=truncate_response")
    refscore_here(tmp_path, "precompute", *options)
    pairs = pl.read_parquet(tmp_path / "data/runs/r/pairs.parquet").filter(pl.col("source_row") == 8)
    assert (pairs["prompt_ids"].list.len() + pairs["chosen_ids"].list.len()).item() == 512


@pytest.mark.parametrize(("words", "stays"), [(200, True), (1200, False)])
def test_a_run_of_the_length_that_once_was_the_default_stays_if_it_left_nothing_out(tmp_path, words, stays):
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    config = config_of(tmp_path, model, [*preference_rows(8), long_row(words)])
    once = ("--config", config, "--run", "r", "--set", "data.max_length=1024")
    refscore_here(tmp_path, "precompute", *once)
    pairs = tmp_path / "data/runs/r/pairs.parquet"
    assert is_current(pairs, load_config(config)) is stays
    assert not is_current(pairs, load_config(config, ["data.too_long=truncate_response"]))
    assert not is_current(pairs, load_config(config, ["data.max_length=1023"]))
    if stays:
        refscore_here(tmp_path, "train", *once, "--set", "train.max_steps=1")
        said = refscore_here(tmp_path, "train", "--config", config, "--run", "r", "--set", "train.max_steps=1")
        assert "nothing to train" in said
        # what is not known to have been left out may have been
        pairs.with_name("dropped.parquet").unlink()
        assert not is_current(pairs, load_config(config))


@pytest.mark.parametrize(
    ("text", "setting", "stays"), [("a", "text", True), ("<|end|>", "text", False), ("<|end|>", "parse", True)]
)
def test_a_run_from_before_control_tokens_were_text_stays_if_no_text_names_one(
    tmp_path, tiny_model, text, setting, stays
):
    config = config_of(tmp_path, tiny_model, [*preference_rows(8), {"prompt": "Hi?", "chosen": text, "rejected": "b"}])
    settings = [f"data.special_tokens={setting}", "data.max_length=300"]
    options = ("--config", config, "--run", "r", *(part for one in settings for part in ("--set", one)))
    refscore_here(tmp_path, "precompute", *options)
    pairs = tmp_path / "data/runs/r/pairs.parquet"
    now = load_config(config, settings)
    assert is_current(pairs, now)
    fields = {name: value for name, value in now.data.deciding().items() if name != "special_tokens"}
    table = pq.read_table(pairs)
    about = json.loads(table.schema.metadata[b"refscore"])
    about["inputs_digest"] = _digest_with(fields, now.reference)
    pq.write_table(
        table.replace_schema_metadata(table.schema.metadata | {b"refscore": json.dumps(about).encode()}), pairs
    )
    assert is_current(pairs, now) is stays


def test_responses_of_any_length_are_scored_without_a_length(tmp_path, tiny_model, monkeypatch):
    """The engine is started for the longest so far, and anew for what is longer, in powers of two and never beyond the model."""
    monkeypatch.setattr("pipeline.precompute.responses._AT_ONCE", 1)
    config = config_of(tmp_path, tiny_model, preference_rows(8))
    rows = [{"prompt": "Hi?", "response": "cat " * words} for words in (3, 5, 100, 400, 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = []
    from pipeline.engines.reference import OpenedReference

    start = OpenedReference.start
    monkeypatch.setattr(OpenedReference, "start", lambda self, longest: started.append(longest) or start(self, longest))
    refscore_here(tmp_path, "score", "rows.jsonl", "--out", "out.parquet", "--config", config)
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table["problem"].null_count() == 5
    assert started == sorted(set(started))
    assert started[-1] == 512
    assert 2 <= len(started) <= 3
