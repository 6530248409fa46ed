"""Fields looked up in the terminal, and the schema for editors."""

import json

import jsonschema
import pytest

from pipeline.config.files import PRESETS, load_config, read_yaml
from pipeline.config.reference import fields_of, schema, sections
from tests.conftest import refscore_here


def test_every_field_is_shown_with_its_words(tmp_path):
    said = " ".join(refscore_here(tmp_path, "config").split())
    for section in sections().values():
        for fact in fields_of(section):
            assert f"{fact.name} [{fact.default}] {' '.join(fact.says.split())}".strip() in said


def test_a_field_is_found_by_its_whole_name_its_last_part_and_its_section(tmp_path):
    said = refscore_here(tmp_path, "config", "train.beta")
    assert said == (
        "train.beta\n  type     number\n  default  0.1\n  limits   > 0\n  meaning  temperature of the implicit reward\n"
    )
    assert refscore_here(tmp_path, "config", "beta") == said
    assert refscore_here(tmp_path, "config", "model").startswith("reference.model\n")
    assert "policy.model\n" in refscore_here(tmp_path, "config", "model")
    assert "list of text" in refscore_here(tmp_path, "config", "data.path")
    assert len(refscore_here(tmp_path, "config", "policy.lora").split("policy.lora.")) == 6


def test_a_name_that_is_none_is_told_the_nearest(tmp_path):
    assert "did you mean 'train.beta'?" in refscore_here(tmp_path, "config", "train.bta", code=2)
    assert "leave the name out" in refscore_here(tmp_path, "config", "train", "--schema", code=2)


def test_the_schema_takes_what_is_taken_and_refuses_what_is_refused(tmp_path):
    made = json.loads(refscore_here(tmp_path, "config", "--schema"))
    assert made == schema()
    check = jsonschema.Draft202012Validator(made)
    check.check_schema(made)
    for preset in PRESETS.glob("*.yaml"):
        content = read_yaml(preset.read_text())
        content.setdefault("data", {}).setdefault("path", "any")
        check.validate(content)
        # and what is saved in a run
        check.validate(load_config(preset, ["data.path=any"]).model_dump(mode="json"))
    data = {"path": ["a", "b"]}
    for sound in (
        {"data": data, "judge": "implicit"},
        {"data": data, "judge": ["implicit", {"name": "llm:x", "label": "y"}]},
        {"data": data, "train": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2]}},
    ):
        check.validate(sound)
    for wrong in (
        {},
        {"data": data, "train": {"bta": 1}},
        {"data": data, "train": {"beta": 0}},
        {"data": data, "train": {"loss_type": "nonsense"}},
        {"data": data, "judge": [5]},
        {"data": data, "judge": [{"label": "x"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check.validate(wrong)


def test_every_field_of_the_schema_has_its_words():
    for name, section in schema()["$defs"].items():
        assert section["additionalProperties"] is False, name
