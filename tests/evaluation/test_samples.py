"""Which samples count as made before, by a key of all that decides them; and which of them judges compare."""

import pytest

from pipeline.config.experiment import GenerateConfig, ReferenceConfig
from pipeline.engines.vllm.generator import Sample
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.figures import win_figures
from pipeline.evaluation.samples import Prompt, comparisons_of, generation_key
from pipeline.judges.judging import Judge, judge_both_orders
from pipeline.rollouts.samples import sample_rows, sample_table

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


def test_against_the_reference_only_comparisons_are_a_star_and_all_models_are_rated():
    models = ["policy", "x", "y", "reference"]
    prompts = [Prompt(name * 32, "What?", "", [1, 2]) for name in "abc"]
    rows = [
        row
        for model, length in zip(models, (9, 6, 3, 1), strict=True)
        for row in sample_rows(model, prompts, [[Sample("e" * length, [1] * length, "stop")] for _ in prompts])
    ]
    table = sample_table(rows)
    star = comparisons_of(table, prompts, models, "reference")
    assert [(item.model, item.baseline) for item in star[::3]] == [(model, "reference") for model in models[:3]]
    assert len(star) == 9
    every_two = comparisons_of(table, prompts, models)
    assert len(every_two) == 18
    assert [item for item in every_two if item.baseline == "reference"] == star

    longer_wins = Judge("longer", lambda duels: [0.9 if len(d.first.text) > len(d.second.text) else 0.1 for d in duels])
    figures = win_figures(judge_both_orders(longer_wins, star), star)
    assert set(figures.ratings["longer"]) == set(models)
    assert figures.ratings["longer"]["policy"].low > 0
    assert {(other.model, other.baseline) for other in figures.others} == {("x", "reference"), ("y", "reference")}
