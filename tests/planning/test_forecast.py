"""Disk by what a run really leaves there, time by products of matrices, and the length that fits a memory."""

import re
import shutil
from types import SimpleNamespace

import pytest

from pipeline.config.files import load_config
from pipeline.planning.forecast import disk, length_that_fits, parameters_in, speeds
from pipeline.planning.outlook import outlook
from pipeline.precompute.plan import make_plan
from tests.conftest import experiment, preference_rows, refscore_here, write_rows


def of(tmp_path, model, rows, *settings):
    path = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", rows))
    config = load_config(path, settings)
    plan = make_plan(config)
    return path, config, plan, outlook(config, plan)


def test_parameters_are_counted_without_loading_them(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameters_in(tiny_model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("settings", [(), ("policy.lora={r: 32}",)], ids=["all weights", "adapter"])
def test_disk_is_what_a_run_leaves_there(tmp_path, tiny_model, settings):
    path, config, plan, seen = of(tmp_path, tiny_model, preference_rows(40), *settings)
    predicted = disk(config, plan, seen)
    options = ["--config", path, "--run", "r", *(part for one in settings for part in ("--set", one))]
    for stage in ("precompute", "train"):
        refscore_here(tmp_path, stage, *options)
    run = tmp_path / "data/runs/r"

    def size(directory, pattern="**/*"):
        return sum(file.stat().st_size for file in directory.glob(pattern) if file.is_file())

    # one of the two checkpoints that stand side by side while the second is written
    assert size(run / "checkpoints") == pytest.approx(predicted.checkpoints / 2, rel=0.25)
    assert size(run / "model", "*.safetensors") == pytest.approx(predicted.model, rel=0.05)
    assert size(tmp_path / "data/store", "**/scores-*.parquet") == pytest.approx(predicted.store, rel=0.7)
    assert (run / "pairs.parquet").stat().st_size == pytest.approx(predicted.pairs, rel=0.5)
    # nothing is left to score
    assert disk(config, make_plan(config), seen).store == 0


def test_what_is_not_kept_takes_no_disk(tmp_path, tiny_model):
    _, config, plan, seen = of(tmp_path, tiny_model, preference_rows(8), "policy.lora={r: 2, merge: false}")
    assert disk(config, plan, seen).model == 0
    _, config, plan, seen = of(tmp_path, tiny_model, preference_rows(8), "train.save_total_limit=3")
    assert disk(config, plan, seen).checkpoints == pytest.approx(4 * 3 * 4 * parameters_in(tiny_model), rel=0.01)


def test_log_probabilities_of_pairs_are_a_part_of_every_checkpoint(tmp_path, tiny_model):
    _, config, plan, seen = of(tmp_path, tiny_model, preference_rows(8))
    before = disk(config, plan, seen).checkpoints
    for split, count in (("train", 10**6), ("eval", 10**5)):
        plan.pairs.splits[split] += count
    assert disk(config, plan, seen).checkpoints - before == 2 * (20 * 10**6 + 40 * 10**5)


def test_time_goes_with_the_model_and_what_is_computed_twice(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("pipeline.planning.forecast._products_per_second", lambda dtype: 6e9)
    _, config, plan, _ = of(tmp_path, tiny_model, preference_rows(8))
    found, number = speeds(config, plan), parameters_in(tiny_model)
    assert found.scoring == pytest.approx(0.5 * 6e9 / (2 * number))
    assert found.training == pytest.approx(0.5 * 6e9 / (6 * number))
    again = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    assert speeds(again, plan).training == pytest.approx(0.5 * 6e9 / (8 * number))


def test_the_length_that_fits_is_that_of_pairs_whose_training_fits(tmp_path, tiny_model):
    rows = [
        *preference_rows(8),
        *({"prompt": f"Hi {n}?", "chosen": "cat " * n, "rejected": "dog " * n} for n in (150, 200)),
    ]
    settings = ("train.tokens_per_batch=64", "data.max_length=400")
    _, config, plan, seen = of(tmp_path, tiny_model, rows, *settings)
    assert seen.tokens_per_pass == seen.longest > 300
    less = seen.training_gib - 0.002
    length = length_that_fits(config, plan, seen, less)
    assert 100 < length < 400
    shorter = of(tmp_path, tiny_model, rows, settings[0], f"data.max_length={length}")[3]
    assert shorter.longest < seen.longest
    assert shorter.training_gib <= less
    # a long pair is not what takes the memory
    wide = config.model_copy(update={"train": config.train.model_copy(update={"tokens_per_batch": 4096})})
    assert length_that_fits(wide, plan, seen, less) is None


def test_the_command_forecasts_time_disk_and_sampling(tmp_path, tiny_model, monkeypatch):
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", preference_rows(40)))
    said = refscore_here(tmp_path, "plan", "--config", config)
    assert re.search(r"training  4 steps, .*, about \d+ s at [\d.e+]+ tokens/s", said)
    assert re.search(r"scoring   .* tokens on each of 1, about \d+ s at [\d.e+]+ tokens/s", said)
    assert re.search(r"time      by products of matrices, \d+ GFLOP/s here now", said)
    assert re.search(r"sampling  at most \d+ held-out prompts x 2 models x 2 responses of up to 16 tokens", said)
    assert re.search(r"disk      0\.\d\d GiB \(checkpoints 0\.\d\d, model 0\.\d\d, .*, [\d.]+ GiB are free", said)
    assert re.search(r"fits      training takes 0\.\d of [\d.]+ GiB", said)
    given = refscore_here(tmp_path, "plan", "--config", config, "--training-speed", 100, "--scoring-speed", 100)
    assert "time      by" not in given
    elsewhere = refscore_here(tmp_path, "plan", "--config", config, "--gpu-memory", 80)
    assert "time      not forecast for a GPU that is not here: give --scoring-speed and --training-speed" in elsewhere
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert "warning   too little disk is free" in refscore_here(tmp_path, "plan", "--config", config)


def test_what_this_machine_has_too_little_of_is_said_without_being_asked(tmp_path, tiny_model, monkeypatch):
    rows = [*preference_rows(8), {"prompt": "Hi?", "chosen": "cat " * 200, "rejected": "dog " * 200}]
    path, _, _, seen = of(tmp_path, tiny_model, rows, "train.tokens_per_batch=64")
    monkeypatch.setattr("stages.plan.memory_here", lambda: seen.training_gib - 0.003)
    said = refscore_here(tmp_path, "plan", "--config", path, "--set", "train.tokens_per_batch=64")
    assert re.search(r"too large training takes [\d.]+ of 0\.\d+ GiB", said)
    assert "GiB with train.gradient_checkpointing=true" in said
    assert re.search(r"or with data\.max_length=\d+: one long pair takes the memory, \d+ tokens", said)
