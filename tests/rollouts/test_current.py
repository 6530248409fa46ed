"""Whether rollouts.parquet is what a configuration asks for: said with what differs, before a training reads it."""

import shutil

import pytest

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import ROLLOUTS
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.files import load_config
from pipeline.errors import ConfigError
from pipeline.rollouts.current import ensure_rollouts, inputs_digest
from tests.conftest import make_tiny_model, preference_rows, write_rows

ASK = "run 'refscore rollout' with the same configuration and run first"


@pytest.fixture
def made(place):
    """A policy and a reference of their own, so that either can change."""
    for name in ("policy", "reference"):
        make_tiny_model(place.where / name)
    place.settings = [f"{section}.model={place.where / section}" for section in ("policy", "reference")]
    place.rollout(*place.settings)
    return place


def ensure(place, *settings):
    ensure_rollouts(load_config(place.config, [*place.settings, *settings]), Run(place.run()))


def test_what_was_made_from_the_same_is_current(made):
    ensure(made)
    assert made.about()["inputs_digest"] == inputs_digest(load_config(made.config, made.settings))


def test_without_the_file_the_way_out_is_said(made):
    (made.run() / "rollouts.parquet").unlink()
    with pytest.raises(ConfigError, match=f"rollouts.parquet does not exist: {ASK}"):
        ensure(made)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("generate.max_tokens=13", "generate.max_tokens: 12 -> 13"),
        ("generate.fixed_length=true", "generate.fixed_length: False -> True"),
        ("generate.dtype=bfloat16", "generate.dtype: 'auto' -> 'bfloat16'"),
        ("rollout.samples=4", "rollout.samples: 3 -> 4"),
        ("rollout.seed=1", "rollout.seed: 0 -> 1"),
        ("rollout.prompts=2", "rollout.prompts: None -> 2"),
        ("rollout.judge=rule:no_repetition", "judge.name: 'rule:contains=dog' -> 'rule:no_repetition'"),
        ("data.eval_fraction=0.5", "data.eval_fraction: 0.25 -> 0.5"),
        ("reference.dtype=bfloat16", "reference.dtype: 'auto' -> 'bfloat16'"),
    ],
)
def test_a_field_that_decides_it_is_named(made, setting, named):
    with pytest.raises(ConfigError) as error:
        ensure(made, setting)
    assert named in str(error.value)
    assert ASK in str(error.value)


@pytest.mark.parametrize(
    "setting",
    ["rollout.prompts_per_shard=1", "generate.temperature=0.1", "train.learning_rate=0.5", "generate.samples=2"],
)
def test_a_field_that_does_not_decide_it_changes_nothing(made, setting):
    ensure(made, setting)


@pytest.mark.parametrize(("name", "said"), [("policy", "another policy than"), ("reference", "another reference than")])
def test_a_model_with_other_weights_under_the_same_name_is_seen(made, name, said):
    shutil.rmtree(made.where / name)
    make_tiny_model(made.where / name, seed=5)
    with pytest.raises(ConfigError, match=said):
        ensure(made)
    made.rollout(*made.settings)
    ensure(made)


def test_other_data_under_the_same_name_is_seen(made):
    write_rows(made.where / "preferences.jsonl", preference_rows(13))
    with pytest.raises(ConfigError, match=r"preferences\.jsonl has changed"):
        ensure(made)


def test_a_judge_with_other_settings_under_the_same_name_is_seen(made, monkeypatch):
    monkeypatch.setattr("pipeline.rollouts.rewards.__version__", "another")
    with pytest.raises(ConfigError, match="rewarded by judge rule:contains=dog with other settings"):
        ensure(made)


def test_another_template_of_the_reference_is_seen(made):
    template = made.where / "reference/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ConfigError, match="another tokenizer or chat template"):
        ensure(made)


def test_a_field_that_did_not_exist_when_the_file_was_written_had_its_default(made):
    path, about = made.run() / "rollouts.parquet", made.about()
    del about["inputs"]["data"]["lists"]
    write_table(path, read_table(path, ROLLOUTS), about)
    ensure(made)
    with pytest.raises(ConfigError, match=r"data.lists: 'best_worst' -> 'all_pairs'"):
        ensure(made, "data.lists=all_pairs")
