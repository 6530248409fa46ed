"""`store explain` names what changed, in each case on a real tiny model directory."""

import json
import re
import shutil
import time

import pytest

from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.precompute.scoring import score_all


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A directory in which run `first` has been scored."""
    where = tmp_path_factory.mktemp("explain")
    make_tiny_model(where / "model")
    data = write_rows(where / "d.jsonl", preference_rows(8))
    config = experiment(where, where / "model", data)
    refscore_here(where, "precompute", "--config", config, "--run", "first")
    return where


@pytest.fixture
def where(scored, tmp_path):
    """A copy of it, in place of the original: paths inside the configuration are relative."""
    copy = shutil.copytree(scored, tmp_path / "copy")
    text = (copy / "experiment.yaml").read_text().replace(f"{scored}/", "")
    (copy / "experiment.yaml").write_text(text)
    refscore_here(copy, "precompute", "--config", "experiment.yaml", "--run", "first")
    return copy


def explain(where, *options):
    return refscore_here(where, "store", "explain", "--config", "experiment.yaml", *options)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_rows(where, number, **values):
    rows = [json.loads(line) for line in (where / "d.jsonl").read_text().splitlines()]
    rows[number] |= values
    write_rows(where / "d.jsonl", rows)


def test_everything_scored_is_a_hit(where):
    assert "16 hits, 0 misses" in explain(where)
    assert "2 hits, 0 misses" in explain(where, "--row", "3")


def test_order_names_and_moved_directories_change_nothing(where):
    rows = [json.loads(line) for line in (where / "d.jsonl").read_text().splitlines()]
    write_rows(where / "renamed.jsonl", rows[::-1])
    (where / "model").rename(where / "moved model")
    (where / "data" / "store").rename(where / "kept")
    said = explain(
        where,
        "--set",
        "data.path=renamed.jsonl",
        "--set",
        "reference.model=moved model",
        "--set",
        "reference.store=kept",
    )
    assert "16 hits, 0 misses" in said


def test_one_weight_bit(where):
    weights = where / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = explain(where)
    assert "16 misses" in said
    assert re.search(r"weights of model\.[\w.]+ '?[0-9a-f]{12}'? -> '?[0-9a-f]{12}'?", said)
    assert said.count("->") == 1


def test_other_weights_are_counted_and_not_listed(where):
    make_tiny_model(where / "model", seed=9)
    said = explain(where)
    assert re.search(r"weights of \d+ tensors, first model\.\S+ [0-9a-f]{12} -> [0-9a-f]{12}", said)
    assert said.count("->") == 1


def test_dtype(where):
    said = explain(where, "--set", "reference.dtype=bfloat16")
    assert "numerics: dtype 'float32' -> 'bfloat16'" in said
    assert said.count("->") == 1


def test_engine_version(where):
    for path in where.glob("data/store/*/reference.json"):
        content = json.loads(path.read_text())
        content["numerics"]["engine_version"] = "transformers 5.0.0, torch 2.9"
        path.write_text(json.dumps(content))
        path.parent.rename(path.parent.with_name("ab" * 32))
    said = explain(where)
    assert re.search(r"numerics: engine_version 'transformers 5.0.0, torch 2.9' -> 'transformers \S+, torch \S+'", said)
    assert said.count("->") == 1


def test_architecture(where):
    edit_json(where / "model" / "config.json", rms_norm_eps=0.125)
    assert re.search(r"config\.json: rms_norm_eps \S+ -> 0\.125", explain(where))


def test_chat_template_edit(where):
    template = where / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|> ", 1))
    said = explain(where)
    assert "16 x the chat template was edited since run first" in said


def test_other_max_length(where):
    said = explain(where, "--set", "data.max_length=70", "--set", "data.too_long=truncate_response")
    assert re.search(
        r"\d+ x the (chosen|rejected) response is cut at \d+ tokens, in run first at \d+ \(data\.max_length\)", said
    )


def test_a_row_that_an_earlier_run_dropped_for_its_length(where):
    shutil.rmtree(where / "data" / "store")
    options = ["--config", "experiment.yaml", "--run", "first", "--set", "data.max_length=70"]
    refscore_here(where, "precompute", *options)
    assert re.search(r"run first dropped the row as too_long \(\d+ tokens, data\.max_length is 70\)", explain(where))


def test_other_system_prompt(where):
    rows = [json.loads(line) | {"system": "Be brief."} for line in (where / "d.jsonl").read_text().splitlines()]
    write_rows(where / "d.jsonl", rows)
    assert "16 x the system prompt differs from run first's" in explain(where)


def test_one_edited_response(where):
    edit_rows(where, 5, chosen="Something else entirely.")
    said = explain(where)
    assert "15 hits, 1 misses" in said
    assert "1 x the chosen response was edited since run first: row 5 chosen" in said
    assert "1 x the chosen response was edited" in explain(where, "--row", "5")


def test_one_edited_prompt_and_a_new_row(where):
    edit_rows(where, 2, prompt="How do I cook beans?")
    rows = [json.loads(line) for line in (where / "d.jsonl").read_text().splitlines()]
    write_rows(where / "d.jsonl", [*rows, {"prompt": "Brand new?", "chosen": "Yes.", "rejected": "No."}])
    said = explain(where)
    assert "2 x the prompt's text differs from run first's: row 2 chosen, row 2 rejected" in said
    assert "2 x no run holds a row with this prompt: it is new" in said


def test_a_lost_shard(where):
    for shard in where.glob("data/store/*/scores-*.parquet"):
        shard.unlink()
    assert "16 x run first used its score; the shard that held it is gone" in explain(where)


def test_a_union_of_data_sets_scores_only_what_is_new(where):
    write_rows(where / "more.jsonl", preference_rows(12)[4:])
    said = refscore_here(
        where, "precompute", "--config", "experiment.yaml", "--run", "union", "--set", "data.path=[d.jsonl, more.jsonl]"
    )
    assert "24 sequences: 16 hits, 8 misses" in said
    assert "4 x duplicate" in said


def test_gc_says_then_does(where, monkeypatch):
    refscore_here(
        where, "precompute", "--config", "experiment.yaml", "--run", "other", "--set", "reference.dtype=bfloat16"
    )
    shutil.rmtree(where / "data" / "runs" / "other")
    # younger than a day it is spared: somebody may be scoring
    assert "used by no run" not in refscore_here(where, "store", "gc")
    later = time.time() + 2 * 24 * 3600
    monkeypatch.setattr("pipeline.store.registrations.time.time", lambda: later)
    said = refscore_here(where, "store", "gc")
    assert "used by no run" in said
    assert "nothing was changed" in said
    assert len(list(where.glob("data/store/*"))) == 2
    refscore_here(where, "store", "gc", "--apply")
    assert len(list(where.glob("data/store/*"))) == 2
    refscore_here(where, "store", "gc", "--apply", "--unreferenced")
    assert len(list(where.glob("data/store/*"))) == 1
    assert "16 hits, 0 misses" in explain(where)


def test_gc_merges_small_shards(where):
    options = ["--config", "experiment.yaml", "--run", "small", "--set", "reference.tokens_per_shard=200"]
    shutil.rmtree(where / "data" / "store")
    refscore_here(where, "precompute", *options)
    assert len(list(where.glob("data/store/*/scores-*"))) > 3
    assert "merged" in refscore_here(where, "store", "gc", "--apply")
    # who asks for nothing is told that it was nothing
    assert "nothing to remove, and no small shards to merge" in refscore_here(where, "store", "gc", "--apply")
    assert "no small shards to merge" in refscore_here(where, "store", "compact")
    assert len(list(where.glob("data/store/*/scores-*"))) == 1
    assert "16 hits, 0 misses" in explain(where)


def test_weights_that_change_while_they_are_scored_stop_the_publication(where, monkeypatch):
    from pipeline.config.files import load_config
    from pipeline.errors import CheckError
    from pipeline.precompute.plan import make_plan

    monkeypatch.chdir(where)
    config = load_config("experiment.yaml", ["reference.dtype=bfloat16"])
    plan = make_plan(config)
    started = plan.reference.start(200)

    class Disturbed:
        def score(self, sequences):
            weights = plan.reference.paths.merged / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
            with started as inner:
                return inner.score(sequences)

    with pytest.raises(CheckError, match="changed while they were scored"):
        score_all(plan, Disturbed())
    assert len(plan.store.lookup(plan.keys).missing) == 16
