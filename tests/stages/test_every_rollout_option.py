"""No silent no-op: changing any field of `rollout` changes what is sampled, rewarded or valued, or what is published together.

A double stands in for vLLM's sampling: what it writes is drawn from all that it is given. Scores are transformers' own.
"""

import shutil

import polars as pl
import pytest
from transformers import AutoModelForSequenceClassification

from pipeline.config.rollouts import RolloutConfig
from tests.conftest import experiment, make_tiny_tokenizer, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here

CHANGES = {
    "samples": 3, "prompts": 4, "judge": "rule:no_repetition", "seed": 5, "prompts_per_shard": 3, "critic": "critic",
}  # fmt: skip


def test_every_field_is_walked():
    assert RolloutConfig.model_fields.keys() == CHANGES.keys()


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_model):
    """A directory with data and a configuration, and what comes out without a change."""
    where = tmp_path_factory.mktemp("options")
    data = write_rows(where / "preferences.jsonl", preference_rows(10))
    judges = ["rule:contains=dog", "rule:no_repetition"]
    config = experiment(where, tiny_model, data, rollout={"samples": 2}, generate={"max_tokens": 8}, judge=judges)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(where / "critic")
    make_tiny_tokenizer().save_pretrained(where / "critic")
    with pytest.MonkeyPatch.context() as patch:
        return where, config, outcome(where, config, patch)


@pytest.mark.parametrize("field", CHANGES)
def test_changing_it_changes_something(ground, field, monkeypatch):
    where, config, before = ground
    value = where / "critic" if field == "critic" else CHANGES[field]
    assert outcome(where, config, monkeypatch, f"rollout.{field}={value}") != before


def test_without_a_change_nothing_changes(ground, monkeypatch):
    """Else the walk would pass for any field."""
    where, config, before = ground
    assert outcome(where, config, monkeypatch) == before


def outcome(where, config, patch, *settings):
    """The rows without their scores, and how many shards there are."""
    sample_here(patch, [])
    shutil.rmtree(where / "data", ignore_errors=True)
    sets = [part for setting in settings for part in ("--set", setting)]
    refscore_here(where, "rollout", "--config", config, "--run", "r", *sets)
    rows = pl.read_parquet(where / "data/runs/r/rollouts.parquet").drop("logps", "ref_logps", "logp", "ref_logp")
    return rows.to_dicts(), len(list((where / "data/runs/r/rollouts").glob("samples-*")))
