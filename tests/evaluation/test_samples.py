"""Which samples count as made before: the key is of all that decides them."""

import pytest

from pipeline.config.experiment import GenerateConfig, ReferenceConfig
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.samples import Prompt, generation_key

PROMPTS = [Prompt("a" * 32, "What?", "", [1, 2])]


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("temperature", 0.1, False),
        ("seed", 4, False),
        ("engine_args", {"quantization": "fp8"}, False),
        ("engine_args", {}, True),
        ("fixed_length", True, False),
        ("fixed_length", False, True),
        ("pair_samples", 3, True),
    ],
)
def test_other_settings_are_other_samples(tiny_model, field, value, same):
    candidate = Candidate("policy", tiny_model, ReferenceConfig())
    keys = [generation_key(candidate, PROMPTS, GenerateConfig(**settings)) for settings in ({}, {field: value})]
    assert (keys[0] == keys[1]) == same
