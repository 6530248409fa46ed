"""Configuration: strict, complete messages, every field described."""

import pytest
from pydantic import BaseModel

from pipeline.config import files
from pipeline.config.documents import read_yaml, write_yaml
from pipeline.config.experiment import Config
from pipeline.config.files import PRESETS, dump_config, load_config, split_overrides
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


@pytest.mark.parametrize("preset", ["demo", "bad_rule"])
def test_settings_of_a_preset_for_other_data_are_said_to_be_its_own(preset, caplog):
    files._warn.cache_clear()
    beta = load_config(preset).train.beta
    load_config(preset, ["data.path=data/runs/r/new_pairs.jsonl"])  # a later round
    load_config("neutral", ["data.path=mine.jsonl"])
    assert not caplog.messages
    for _ in range(2):
        load_config(preset, ["data.path=mine.jsonl"])
    (said,) = caplog.messages
    assert f"preset {preset} are those of its own data" in said
    assert f"train.beta={beta:g}" in said
    assert "for mine.jsonl 'refscore init' writes a configuration, or take --config neutral" in said


def test_numbers_are_those_of_yaml_1_2_and_words_stay_words(tmp_path):
    path = write(tmp_path, "data: {path: [on, yes]}\ntrain: {learning_rate: 1e-6}\n")
    config = load_config(path, ["train.beta=5e-1"])
    assert (config.data.path, config.train.learning_rate, config.train.beta) == (["on", "yes"], 1e-6, 0.5)
    again = write(tmp_path, dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("sign", "\x1b\x7f\x85\x9f\u2028\u2029\ufeff\uffff\U0001f600é\"'\\\t\n\r")
@pytest.mark.parametrize("around", ["{}", "a{}b", " {}{} ", "a {}\n b"])
def test_any_text_is_read_back_as_it_was_written(sign, around):
    text = around.format(sign, sign)
    assert read_yaml(write_yaml({"data": {"path": [text]}, text: text})) == {"data": {"path": [text]}, text: text}


def test_all_problems_are_reported_at_once_with_the_nearest_known_name(tmp_path):
    path = write(tmp_path, "data: {path: a.jsonl}\ntrain: {bta: 0.1, learning_rate: -1}\njudge: [rule:brief]\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.seed=x", "nonsense"])
    text = str(error.value)
    assert "unknown key 'train.bta', did you mean 'train.beta'?" in text
    for part in ("train.learning_rate", "train.seed", "--set 'nonsense': not of the form"):
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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train:\n  beta: 0.1\n  beta: 0.2", 'line 4, column 3: found duplicate key "beta"; keep one'),
        ("train: {beta: true}", "train.beta: true and false are no numbers"),
        ("train: {loss_weights: [true]}", "train.loss_weights: true and false are no numbers"),
        ("judge: [{name: implicit, max_tokens: true}]", "judge.0.max_tokens: true and false are no numbers"),
        ("policy: {lora: {r: false}}", "policy.lora.r: true and false are no numbers"),
        ("train: {seed: 010}", "train.seed: 010 is 10 to some readers of YAML and 8 to others: write 10, or 8"),
        ("reference: {engine_args: {a: 08}}", "reference.engine_args.a: 08 has a leading zero: write 8"),
        ("train: {beta: .inf}", "train.beta: Input should be a finite number, got inf"),
        ("train: {f_alpha_divergence_coef: .nan}", "train.f_alpha_divergence_coef: Input should be a finite number"),
        ("train: {learning_rate: 1e999}", "train.learning_rate: Input should be a finite number, got inf"),
        ("train: {seed: 99999999999999999999}", "train.seed: larger than any number here may be"),
        ("train: !!int x", "not readable as YAML: invalid literal for int()"),
        ("train: {seed: !!int ''}", "not readable as YAML: line 2, column 15: '' is no !!int"),
        ("train: {beta: !!float _}", "not readable as YAML: line 2, column 15: '_' is no !!float"),
        ("train: {bf16: !!bool maybe}", "not readable as YAML: line 2, column 15: 'maybe' is no !!bool"),
        ("train: " + "[" * 5000, "not readable as YAML: nested too deeply"),
        ("train: &a {beta: *a}", "train.beta"),
    ],
)
def test_what_could_be_meant_otherwise_is_refused_with_its_name(tmp_path, text, problem):
    path = write(tmp_path, f"data: {{path: a.jsonl}}\n{text}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    said = str(error.value)
    assert problem in said
    assert str(path) in said
    assert "--set" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.beta=-1"], ["--set 'train.beta=-1': train.beta: Input should be greater than 0"]),
        (["train={seed: 08}"], ["--set 'train={seed: 08}': train.seed: 08 has a leading zero"]),
        (["train.seed=1", "train.bta=1"], ["--set 'train.bta=1': unknown key 'train.bta'"]),
        (["train.beta="], ["--set 'train.beta=': no value after '='"]),
        ([""], ["--set '': not of the form section.field=value"]),
        (["=1"], ["--set '=1': not of the form"]),
        (["train..beta=1"], ["--set 'train..beta=1': not of the form"]),
        (["policy.lora={r: 1, r: 2}"], ["--set 'policy.lora={r: 1, r: 2}': the value is not", 'duplicate key "r"']),
        (["train.seed=3", "train.optimizer_in_backward=true"], ["--set 'train.seed=3' --set 'train.optimizer_in"]),
        (["train.learning_rate.x=3"], ["'learning_rate' is 0.1, which has no fields"]),
    ],
)
def test_what_an_override_breaks_is_blamed_on_it_and_not_on_the_file(tmp_path, overrides, said):
    path = write(tmp_path, "data: {path: a.jsonl}\ntrain: {learning_rate: 0.1}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    for part in said:
        assert part in str(error.value)
    assert str(path) not in str(error.value)


def test_file_and_overrides_each_get_their_own_blame(tmp_path):
    path = write(tmp_path, "data: {path: a.jsonl}\ntrain: {beta: -1}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.seed=x"])
    assert f"{path}: train.beta: Input should be greater" in str(error.value)
    assert "--set 'train.seed=x': train.seed" in str(error.value)
    # what an override mends is no problem of the file's any more
    assert load_config(path, ["train.beta=0.3"]).train.beta == 0.3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train.beta=1 train.seed=2", ["train.beta=1", "train.seed=2"]),
        (" train.beta=1\n judge=implicit ", ["train.beta=1", "judge=implicit"]),
        (
            "data.columns={prompt: question, chosen: a b} train.seed=2",
            ["data.columns={prompt: question, chosen: a b}", "train.seed=2"],
        ),
        ("data.path=my pairs.jsonl data.max_rows=2", ["data.path=my pairs.jsonl", "data.max_rows=2"]),
        ("data.path=Bob's.jsonl data.max_rows=2", ["data.path=Bob's.jsonl", "data.max_rows=2"]),
        ("data.path='a data.max_rows=2' train.seed=1", ["data.path='a data.max_rows=2'", "train.seed=1"]),
        ("train.seed=1 trian.beta=2", ["train.seed=1", "trian.beta=2"]),
        ("data.path=a=b.jsonl", ["data.path=a=b.jsonl"]),
    ],
)
def test_a_text_may_hold_several_overrides(text, parts):
    assert split_overrides([text]) == parts


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
