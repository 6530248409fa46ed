"""No silent no-op: changing any field of `generate` changes samples, verdicts, KL, new pairs, or what comes next.

A double stands in for vLLM's sampling: what it writes is drawn from all that it is given. Scores are transformers' own.
"""

import json
import shutil

import polars as pl
import pytest

import stages.iterate
from pipeline.config.experiment import GenerateConfig
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.engines.sampling import sample_here
from tests.judges.letter_server import Server

# field: the change, and what must be set beside it (in both runs) for the field to have a meaning
EVAL = {
    "generate.max_tokens": (5, {}),
    "generate.fixed_length": (True, {}),
    "generate.temperature": (0.2, {}),
    "generate.top_p": (0.5, {}),
    "generate.samples": (2, {}),
    "generate.seed": (9, {}),
    "generate.max_prompts": (2, {}),
    "generate.dtype": ("bfloat16", {}),
    "generate.engine_args": ("{max_num_seqs: 3}", {}),
    "generate.baseline": ("other", {}),
    "generate.models": ("{x: other}", {}),
    "generate.compare": ("reference", {"generate.models": "{x: other}"}),
    "generate.kl_samples": (2, {}),
}
PAIRS = {
    "generate.pair_samples": (3, {}),
    "generate.pair_prompts": (2, {}),
    "generate.pair_judge": ("rule:contains=dog", {"generate.pair_margin": 0.1}),
    "generate.pair_margin": (0.0, {}),
}
ITERATE = {"generate.next_reference": ("previous", {})}
COMMANDS = {"eval": EVAL, "pairs": PAIRS, "iterate": ITERATE}
CHANGES = {name: (command, *change) for command, fields in COMMANDS.items() for name, change in fields.items()}
TABLES = ("samples", "kl", "judgements", "pair_samples")


def test_every_field_is_walked():
    assert {f"generate.{name}" for name in GenerateConfig.model_fields} == CHANGES.keys()


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_model):
    """A directory with a trained run, and a memory of what commands without a change gave."""
    where = tmp_path_factory.mktemp("options")
    make_tiny_model(where / "other", seed=1)
    data = write_rows(where / "preferences.jsonl", preference_rows(14))
    judges = ["rule:complete_and_concise", "rule:contains=e"]
    config = experiment(where, tiny_model, data, train={"max_steps": 1}, judge=judges)
    config.write_text(config.read_text().replace("eval_fraction: 0.25", "eval_fraction: 0.4"))
    for stage in ("precompute", "train"):
        refscore_here(where, stage, "--config", config, "--run", "r")
    # a first round of `iterate`
    shutil.copytree(where / "data/runs/r", where / "data/runs/r-r1")
    return where, config, {}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_it_changes_something(ground, field, monkeypatch):
    where, config, known = ground
    command, value, beside = CHANGES[field]
    name = f"{command} {beside}"
    if name not in known:
        known[name] = outcome(where, config, command, beside, monkeypatch)
    assert outcome(where, config, command, {**beside, field: value}, monkeypatch) != known[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_change_nothing_changes(ground, command, monkeypatch):
    """Else the walk would pass for any field."""
    where, config, _ = ground
    first, second = (outcome(where, config, command, {}, monkeypatch) for _ in range(2))
    assert first == second
    assert any(first)


def test_at_a_fixed_length_pairs_are_made_of_responses_without_an_end(ground, monkeypatch):
    where, config, _ = ground
    beside = {"generate.pair_judge": "rule:contains=dog", "generate.pair_margin": 0.1, "generate.max_tokens": 3}
    _, _, pairs, *_ = outcome(where, config, "pairs", {**beside, "generate.fixed_length": True}, monkeypatch)
    rows = [json.loads(line) for line in pairs.splitlines()]
    assert rows
    assert all(row["chosen_cut_off"] and row["rejected_cut_off"] for row in rows)


@pytest.mark.parametrize("command", ["eval", "pairs"])
def test_the_terminal_shows_how_far_a_judge_that_is_asked_has_come(ground, command, monkeypatch):
    where, config, _ = ground
    server = Server()
    sample_here(monkeypatch, [])
    judge = f"judge=[{{name: 'llm:{server.url}', label: far, model: m}}]"
    # at a fixed length no response is too short for a pair
    settings = {"pair_margin": 0, "pair_samples": 2, "kl_samples": 0, "max_tokens": 3, "fixed_length": True}
    sets = [part for name, value in settings.items() for part in ("--set", f"generate.{name}={value}")]
    try:
        said = refscore_here(where, command, "--config", config, "--run", "r", "--set", judge, *sets)
    finally:
        server.shutdown()
        server.server_close()
    assert f"far judges {len(server.asked)}/{len(server.asked)}  0 failed" in said


def outcome(where, config, command, settings, monkeypatch):
    """Tables, new pairs, what the engine and the steps of `iterate` were told, and the figures without times."""
    told = []
    run = where / "data/runs/r"
    for name in ("eval.json", "new_pairs.jsonl", "held_out.jsonl", *(f"{table}.parquet" for table in TABLES)):
        (run / name).unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        sample_here(patch, told)
        patch.setattr(
            stages.iterate, "step", lambda stage, config, name, overrides: told.append((stage, name, overrides))
        )
        arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        options = ("--config", config, "--run", "r", *arguments)
        said = ""
        try:
            refscore_here(where, command, *options, *(("--rounds", 2) if command == "iterate" else ()))
        except AssertionError as failed:  # it holds what was said
            said = str(failed).partition("error: ")[2]
    tables = [
        pl.read_parquet(run / f"{name}.parquet").to_dicts() if (run / f"{name}.parquet").is_file() else None
        for name in TABLES
    ]
    figures = json.loads((run / "eval.json").read_text()) if (run / "eval.json").is_file() else {}
    # said again, not read
    figures.pop("pair_judge", None)
    for step in told if command == "iterate" else []:
        # the overrides themselves go to every stage, so only what `iterate` adds to them tells
        step[2][:] = [one for one in step[2] if not one.startswith("generate.next_reference")]
    pairs = (run / "new_pairs.jsonl").read_text() if (run / "new_pairs.jsonl").is_file() else ""
    return tables, figures, pairs, told, said
