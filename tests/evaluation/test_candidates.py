"""Which models stage three samples, and which it refuses."""

import pytest

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.config.experiment import Config
from pipeline.engines.reference import open_reference
from pipeline.errors import ConfigError
from pipeline.evaluation.candidates import candidates, must_share_vocabulary, policy_of
from pipeline.models.load import load_tokenizer, vocabulary_digest
from tests.conftest import make_tiny_tokenizer


def opened(config, run):
    return candidates(config, run, open_reference(config.reference))


def configured(model, **sections):
    content = {"data": {"path": "a"}, "reference": {"model": str(model)}, "policy": {"model": str(model)}}
    return Config.model_validate(content | sections)


def trained(tmp_path, name, kind="model"):
    run = Run(tmp_path / "data" / "runs" / name)
    file = "config.json" if kind == "model" else "adapter_config.json"
    durable.write_json(run.directory / kind / file, {"r": 4})
    return run


def test_policy_others_and_reference_in_this_order(tmp_path, tiny_model):
    run = trained(tmp_path, "one")
    trained(tmp_path, "two", "adapter")
    durable.write_json(tmp_path / "lora" / "adapter_config.json", {"base_model_name_or_path": str(tiny_model)})
    config = configured(
        tiny_model, generate={"models": {"before": "run:two", "lora": "lora", "plain": str(tiny_model)}}
    )
    found = opened(config, run)
    assert [one.name for one in found] == ["policy", "before", "lora", "plain", "reference"]
    assert found[0].adapter is None
    # an adapter stands on the model it names, else on the configured policy
    assert (found[1].base, found[1].adapter.parent.name) == (tiny_model, "two")
    assert found[2].base == tiny_model
    assert found[2].described.startswith("lora on ")


def test_a_baseline_takes_the_references_place(tmp_path, tiny_model):
    trained(tmp_path, "two")
    config = configured(tiny_model, generate={"baseline": "run:two"})
    assert opened(config, trained(tmp_path, "one"))[-1].base.parent.name == "two"


def test_what_is_not_there_is_said(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="run 'refscore train'"):
        opened(configured(tiny_model), Run(tmp_path / "none"))
    config = configured(tiny_model, generate={"models": {"x": "run:gone"}})
    with pytest.raises(ConfigError, match=r"'x': .*gone"):
        opened(config, trained(tmp_path, "one"))


def test_a_reward_model_writes_no_responses(tmp_path, tiny_model):
    config = configured(tiny_model, train={"objective": "reward"})
    with pytest.raises(ConfigError, match="use it as a judge, reward_model:"):
        policy_of(config, trained(tmp_path, "one"))


def test_models_of_another_vocabulary_are_refused(tmp_path, tiny_model):
    config = configured(tiny_model)
    models = opened(config, trained(tmp_path, "one"))[-1:]
    must_share_vocabulary(models, vocabulary_digest(load_tokenizer(tiny_model, config.policy)))
    other = make_tiny_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ConfigError, match="another vocabulary"):
        must_share_vocabulary(models, vocabulary_digest(other))
