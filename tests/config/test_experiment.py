"""Configuration: strict, complete messages, every field described."""

import pytest
from pydantic import BaseModel

from pipeline.config.experiment import Config
from pipeline.config.files import PRESETS, dump_config, load_config
from pipeline.errors import ConfigError
from pipeline.pairs.rows import local_path


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_parses_and_its_files_exist(preset):
    # the neutral one leaves open what only its user knows
    own = ["data.path=embedded:demo/train.jsonl"] if preset.stem == "neutral" else []
    config = load_config(preset, own)
    for path in [*config.data.path, config.data.eval_path]:
        assert path is None or local_path(path).is_file()


def test_a_preset_has_a_name_that_a_file_of_ones_own_comes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("demo") == load_config(PRESETS / "demo.yaml")
    (tmp_path / "demo").write_text("data: {path: mine.jsonl}\n")
    assert load_config("demo").data.path == ["mine.jsonl"]


def test_numbers_are_those_of_yaml_1_2_and_words_stay_words(tmp_path):
    path = write(tmp_path, "data: {path: [on, yes]}\ntrain: {learning_rate: 1e-6}\n")
    config = load_config(path, ["train.beta=5e-1"])
    assert (config.data.path, config.train.learning_rate, config.train.beta) == (["on", "yes"], 1e-6, 0.5)
    again = write(tmp_path, dump_config(config))
    assert load_config(again) == config


def test_all_problems_are_reported_at_once_with_the_nearest_known_name(tmp_path):
    path = write(tmp_path, "data: {path: a.jsonl}\ntrain: {bta: 0.1, learning_rate: -1}\njudge: [rule:brief]\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.seed=x", "nonsense"])
    text = str(error.value)
    assert "unknown key 'train.bta', did you mean 'train.beta'?" in text
    for part in ("train.learning_rate", "train.seed", "'nonsense' is not of the form"):
        assert part in text


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("judge=rule:brief", "judge 'rule:brief' is unknown"),
        ("reference.trust_remote_code=true", "needs reference.revision as a full 40-digit commit"),
        ("data.path=[]", "data.path"),
        ("train.loss_type=nope", "train.loss_type"),
        ("data.columns={question: prompt}", "data.columns"),
    ],
)
def test_nonsense_is_refused(tmp_path, override, problem):
    path = write(tmp_path, "data: {path: a.jsonl}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert problem in str(error.value)


def test_overrides_reach_nested_fields_and_numbers_are_numbers(tmp_path):
    path = write(tmp_path, "data: {path: a.jsonl}\n")
    config = load_config(path, ["train.learning_rate=1e-6", "data.path=[x.jsonl, y.jsonl]", "judge=implicit"])
    assert config.train.learning_rate == 1e-6
    assert config.data.path == ["x.jsonl", "y.jsonl"]
    assert [judge.name for judge in config.judge] == ["implicit"]


def test_the_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(write(tmp_path, "data: {path: a.jsonl, columns: {prompt: q}}\ntrain: {beta: 0.3}\n"))
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("text", ["", "just text", "a: [1", "\xff"])
def test_a_file_that_is_no_configuration_is_a_message(tmp_path, text):
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))


def test_a_missing_file_names_the_presets():
    with pytest.raises(ConfigError, match="shipped presets: bad_rule, demo"):
        load_config("absent.yaml")


def test_every_field_that_does_not_say_itself_is_described():
    obvious = {"learning_rate", "weight_decay", "max_grad_norm", "logging_steps", "temperature", "seed"} | set(
        Config.model_fields
    )
    for section in Config.model_fields.values():
        if isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel):
            bare = {name for name, field in section.annotation.model_fields.items() if not field.description}
            assert bare <= obvious


def test_tensor_parallelism_without_vllm_is_refused(tmp_path):
    text = "data: {path: a.jsonl}\nreference: {engine: transformers, tensor_parallel_size: 2}\n"
    with pytest.raises(ConfigError, match=r"needs reference\.engine=vllm"):
        load_config(write(tmp_path, text))
