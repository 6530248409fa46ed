"""What is proposed for which data, model and memory."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.documents import read_yaml
from pipeline.config.files import load_config, load_overrides
from pipeline.pairs.preferences import Preference
from pipeline.planning import proposal, shape
from pipeline.planning.proposal import Choice, Proposal, _held_out, _judges, propose
from pipeline.planning.shape import _length
from pipeline.planning.survey import Survey


def found(model, lengths, positions=512, prompts=20, texts=(("Fine.", "It is."),)):
    lengths = np.asarray(lengths)
    responses = np.stack([lengths - prompts, np.full(len(lengths), 5)], axis=1)
    survey = Survey(["mine.jsonl"], str(model), Path(model), positions, has_template=True, template="chat")
    survey.prompts, survey.responses = np.full(len(lengths), prompts), responses
    survey.places = (np.arange(len(lengths)) + 0.5) / len(lengths)
    survey.looked_at = [
        Preference("mine.jsonl", at, [{"role": "user", "content": "How?"}], *sides) for at, sides in enumerate(texts)
    ]
    return survey


def chosen(made):
    return {choice.field: choice.value for choice in made.choices}


@pytest.mark.parametrize(
    ("lengths", "positions", "length"),
    [
        ([100] * 99 + [130], None, 192),  # the longest is near the others
        ([100] * 99 + [130], 120, 120),  # never more than the model reads
        ([100] * 199 + [4000], None, 128),  # one that stands out is left out
        ([64] * 10, None, 64),
    ],
)
def test_the_length_keeps_all_but_what_stands_out(lengths, positions, length):
    assert _length(found("x", lengths, positions)) == length


@pytest.mark.parametrize(
    ("prompts", "share", "held_out"),
    [(100_000, 0.01, 1000), (1000, 0.1, 100), (150, 0.14, 21), (60, 0.34, 20), (30, 0.34, 10), (2, 0.34, 1), (1, 0, 0)],
)
def test_twenty_prompts_are_held_out_if_there_are_enough_and_never_all(prompts, share, held_out):
    places = (np.arange(prompts) + 0.5) / prompts
    given, held, number = _held_out(np.concatenate([places, places]))
    assert (given, number) == (pytest.approx(share, abs=0.02), prompts)
    assert abs(held - held_out) <= 1
    if prompts > 1:
        assert 0 < held < prompts


@pytest.mark.parametrize(("pairs", "batch", "epochs"), [(100, 8, 3), (1000, 16, 3), (1500, 16, 2), (6000, 32, 1)])
def test_few_pairs_get_small_steps_and_more_epochs(tiny_model, pairs, batch, epochs):
    made = chosen(propose(found(tiny_model, [100] * pairs)))
    assert (made["train.per_device_train_batch_size"], made["train.num_train_epochs"]) == (batch, epochs)


@pytest.mark.parametrize(
    ("memory", "made"),
    [
        (20, (448, 1024, False, False)),
        (8.0, (448, 256, False, False)),
        (7.6, (448, 1024, True, False)),
        (6.6, (448, 1024, False, True)),
        (5.6, (448, 1024, True, True)),
        (5.0, (448, 256, True, True)),
        (4.2, (128, 256, True, True)),
        (1, (128, 256, True, True)),
    ],
)
def test_what_does_not_fit_gets_smaller_step_by_step(tiny_model, monkeypatch, memory, made):
    def needed(found, tried, kind):
        return 7.0 + tried.length / 448 + tried.tokens_per_batch / 1024 - 2 * tried.lora - tried.checkpointing - 0.5

    monkeypatch.setattr(shape, "_needed", needed)
    monkeypatch.setattr(proposal, "memory_here", lambda: memory / 0.8)
    monkeypatch.setattr(proposal, "device_kind", lambda: "cpu")
    given = propose(found(tiny_model, [100] * 60 + [400] * 40))
    values = chosen(given)
    lora = "policy.lora" in values
    assert made == (
        values["data.max_length"],
        values["train.tokens_per_batch"],
        values.get("train.gradient_checkpointing", False),
        lora,
    )
    assert values["train.learning_rate"] == pytest.approx(5e-5 if lora else 5e-6)
    assert bool(given.remarks) == (memory == 1)
    load_overrides(given.content(), [])


def test_what_fits_nowhere_is_said_with_the_memory_of_a_real_step(tiny_model, monkeypatch):
    monkeypatch.setattr(proposal, "memory_here", lambda: 0.1)
    given = propose(found(tiny_model, [100] * 60 + [400] * 40))
    assert "training is predicted to take 0.7 of 0.1 GiB: take a smaller model" in given.remarks[0]


def test_models_of_any_size_are_named_by_it():
    assert [proposal._millions(number) for number in (123_456, 134_515_008, 8_030_261_248)] == ["0.12", "135", "8,030"]


def test_every_reason_names_the_memory_that_was_predicted(tiny_model, monkeypatch):
    monkeypatch.setattr(proposal, "memory_here", lambda: 64.0)
    made = propose(found(tiny_model, [100] * 100))
    because = next(choice.because for choice in made.choices if choice.field == "train.tokens_per_batch")
    assert "training is predicted to take 0.7 of 64.0 GiB" in because


def test_a_model_whose_memory_is_not_predicted_gets_the_usual(tmp_path, monkeypatch):
    from tests.forward.test_architectures import build

    build("Mixtral").save_pretrained(tmp_path)
    made = propose(found(tmp_path, [100] * 100))
    because = next(choice.because for choice in made.choices if choice.field == "train.tokens_per_batch")
    assert "memory is not predicted for" in because


REPEATING = " ".join(["go on and on"] * 12)


def test_rules_judge_that_tell_the_pairs_apart_as_they_were_chosen():
    apart = [("Rice is boiled in water for ten minutes.", REPEATING)] * 30
    judges, because = _judges(found("x", [100], texts=apart))
    assert "rule:no_repetition" in judges
    assert judges[-1] == "implicit"
    assert "rule:no_repetition tells 100% of the pairs apart and prefers the chosen one in 100% of them" in because
    against, because = _judges(found("x", [100], texts=[(rejected, chosen) for chosen, rejected in apart]))
    assert "rule:complete_and_concise" not in against
    assert "watches over fluency" in because
    few, _ = _judges(found("x", [100], texts=apart[:5]))
    assert few == ["rule:no_repetition", "implicit"]


def test_the_rule_that_agrees_most_often_leads():
    cut_off = [("Rice is boiled in water and then it", "Rice is boiled in water for ten minutes.")] * 10
    apart = [("Rice is boiled in water for ten minutes.", REPEATING)] * 30
    judges, because = _judges(found("x", [100], texts=[*apart, *cut_off]))
    assert judges == ["rule:no_repetition", "rule:complete_and_concise", "implicit"]
    assert "prefers the chosen one in 75% of them" in because


def test_json_is_judged_where_the_chosen_responses_are_json():
    judges, _ = _judges(found("x", [100], texts=[('{"a": 1}', "a is 1")] * 30))
    assert "rule:json_valid" in judges
    plain, _ = _judges(found("x", [100], texts=[("a is 1.", "a is 2.")] * 30))
    assert "rule:json_valid" not in plain


def test_what_no_rule_reads_is_left_to_the_pairs():
    judges, _ = _judges(found("x", [100], texts=[("%% ##", "## %%")] * 30))
    assert judges == ["implicit"]


def test_the_text_reads_back_whatever_the_names_are(tmp_path):
    made = Proposal()
    names = ['it\'s "mine".jsonl', "a: b #c.jsonl", "é\t数.jsonl", "- x\n.jsonl", "010"]
    made.add("data.path", names, "why: \n because # of it")
    made.add("train.learning_rate", 5e-6, "x" * 300)
    made.add("judge", ["implicit"], "")
    path = tmp_path / "c.yaml"
    path.write_text(made.text("title\nof two: lines"), encoding="utf-8")
    config = load_config(path)
    assert config.data.path == names
    assert config.train.learning_rate == 5e-6
    assert Choice("a.b", True, "").shown == "true"


@pytest.mark.parametrize("sign", '\x1b\x7f\x85\x9f\u2028\ufeff\uffff\udcff\U0001f600é"\\\t')
def test_a_file_of_any_name_is_read_back_as_itself(sign):
    name = f"my{sign}pairs.jsonl"
    proposal = Proposal([Choice("data.path", name, f"{name}: TRL explicit")])
    text = proposal.text(f"Written for {name}")
    assert read_yaml(text.encode().decode()) == {"data": {"path": name}}
