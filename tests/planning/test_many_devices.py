"""What a training over several devices holds on each: by hand, by two real processes, and what the plan says of it."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.files import load_config
from pipeline.errors import ConfigError
from pipeline.planning import outlook as outlooks
from pipeline.planning.forecast import length_that_fits
from pipeline.planning.outlook import devices_that_fit, of_process, on_a_gpu, outlook, smaller
from pipeline.planning.training import held_by, simulate_step
from pipeline.precompute.plan import make_plan
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.step import accumulate
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.planning.test_planning import short_pairs
from tests.training.policy import config_of, policy_of

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = bool(os.environ.get("REFSCORE_DEVICES"))
HELD = [("train.precision=bfloat16",), (), ("policy.lora={r: 4}",)]


@pytest.mark.parametrize("devices", [2, 3])
def test_each_device_holds_its_part_by_hand(tmp_path, devices):
    base = make_tiny_model(tmp_path / "tiny", num_hidden_layers=8)
    held = simulate_step(config_of(base), base, 256, 128, "cpu", devices)
    model = policy_of(base, config_of(base)).model
    weights = list(model.parameters())
    # rows are shared out, and the first device has the larger parts
    part = sum(4 * math.ceil(len(weight) / devices) * weight[0].numel() for weight in weights)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert held.weights == part + buffers
    # two moments, and a count of steps for each weight
    assert held.optimizer == 2 * part + 4 * len(weights)
    assert held.gradients <= part
    # embeddings, last norm and head stay whole through a pass; of the layers one is read and one on its way, in a buffer too
    layer = 4 * sum(weight.numel() for weight in model.model.layers[0].parameters())
    outer = 4 * sum(weight.numel() for weight in weights) - 8 * layer
    assert outer <= held.gathered <= outer + 4 * layer


def test_gradients_of_an_earlier_pass_are_counted(tiny_model):
    config = config_of(tiny_model)
    for devices in (1, 2):
        first, later = (
            simulate_step(config, tiny_model, 512, 256, "cpu", devices, accumulated=value) for value in (False, True)
        )
        assert later.total > first.total
    policy, pairs = policy_of(tiny_model, config), short_pairs()
    policy.model.train()
    optimizer = make_optimizer(policy.model, config.train)
    update(policy.model, optimizer, 1e-6, 1.0, accumulate(policy.forward, pairs, range(4), config.train))
    # torch's tracker knows one pass
    accumulate(policy.forward, pairs, (0, 1), config.train)
    with held_by(policy.model, optimizer) as peak:
        update(policy.model, optimizer, 1e-6, 1.0, accumulate(policy.forward, pairs, (2, 3), config.train))
    simulated = simulate_step(config, tiny_model, 256, 136, "cpu", accumulated=True)
    assert simulated.gradients == pytest.approx(peak[0].gradients, rel=0.01)
    assert simulated.total == pytest.approx(peak[0].total, rel=0.1)


def test_a_step_of_several_passes_is_seen(tmp_path, tiny_model):
    for settings, devices, several in (
        ((), 1, False),
        (("train.gradient_accumulation_steps=16", "train.tokens_per_batch=256"), 1, True),
        (("train.gradient_accumulation_steps=16", "train.tokens_per_batch=256"), 64, False),
    ):
        config, plan = of(tmp_path, tiny_model, *settings)
        assert outlook(config, plan, "cuda", devices).accumulated == several


@pytest.mark.skipif(
    not EVERYTHING, reason="each starts torchrun anew: make test-devices; others compare with figures by hand"
)
@pytest.mark.parametrize("settings", HELD, ids=str)
def test_a_simulated_step_holds_what_one_of_two_processes_holds(tiny_model, settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.planning.held", str(tiny_model), *settings],
        check=False, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout.strip().splitlines()[-1])
    # two trees of 128 tokens on each
    held = vars(simulate_step(config_of(tiny_model, *settings), tiny_model, 256, 136, "cpu", 2))
    assert held["weights"] == real["weights"]
    assert held["optimizer"] == pytest.approx(real["optimizer"], rel=0.01)
    assert held["gathered"] == pytest.approx(real["gathered"], rel=0.1)
    assert sum(held.values()) == pytest.approx(sum(real.values()), rel=0.15)


def test_nothing_is_left_of_the_processes_that_only_seemed_to_be_there(tiny_model):
    peaks = [simulate_step(config_of(tiny_model), tiny_model, 64, 32, "cuda", devices).total for devices in (2, 4, 2)]
    assert peaks[0] == peaks[2] > peaks[1]
    assert not torch.distributed.is_initialized()
    assert torch.get_default_device().type == "cpu"


def of(tmp_path, model, *settings):
    path = experiment(tmp_path, model, write_rows(tmp_path / "d.jsonl", preference_rows(8)))
    config = on_a_gpu(load_config(path, settings))
    return config, make_plan(config)


def test_what_many_devices_do_not_train_is_not_proposed_for_them(tmp_path, tiny_model):
    config, plan = of(tmp_path, tiny_model)
    for devices, told in ((1, True), (2, False)):
        tried = [settings for settings, _ in smaller(config, outlook(config, plan, "cuda", devices), 0.0)]
        assert ("activation_offloading" in tried[-1]) == told
        assert ("optimizer_in_backward" in tried[-1]) == told
        assert "policy.dtype=bfloat16" in tried[-1]
    config, plan = of(tmp_path, tiny_model, "train.activation_offloading=true")
    seen = outlook(config, plan, "cuda", 2)
    assert seen.training is None
    assert "training on 2 devices does not know train.activation_offloading" in seen.unpredicted
    with pytest.raises(ConfigError, match=r"does not know train\.activation_offloading"):
        devices_that_fit(config, outlook(config, plan, "cuda"), 0.0)


def test_the_fewest_devices_that_fit_are_found(tmp_path, tiny_model, monkeypatch):
    config, plan = of(tmp_path, tiny_model)
    seen = outlook(config, plan, "cuda")
    two = of_process(outlook(config, plan, "cuda", 2).training.total, "cuda")
    assert devices_that_fit(config, seen, two) == (2, two)
    assert devices_that_fit(config, seen, 0.5) is None
    monkeypatch.setattr(outlooks, "_on", lambda config, seen, devices: 64 / devices)
    for gib, found in ((9, (8, 8)), (100, (2, 32)), (1, (64, 1)), (0.9, None)):
        assert devices_that_fit(config, seen, gib) == found
    assert devices_that_fit(config, outlook(config, plan, "cuda", 4), 100) == (8, 8)


def answer_of(where, *arguments):
    said = refscore_here(where, *arguments, "--json")
    return json.loads(said[said.index("\n{") :])["training"]


def test_the_command_says_what_each_device_takes(tmp_path, tiny_model):
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "preferences.jsonl", preference_rows(8)))
    asked = ("plan", "--config", config, "--gpu-memory", 80, "--training-speed", 10)
    said = refscore_here(tmp_path, *asked, "--devices", 2)
    assert "Training on each of 2 devices (cuda), simulated" in said
    assert "gathered" in said
    tokens, each = (
        int(found.replace(",", ""))
        for found in re.search(r"about ([\d,]+) tokens, ([\d,]+) on each of 2", said).groups()
    )
    assert each == tokens // 2
    assert re.search(r"fits      training takes 0\.\d of 80 GiB on each of 2 devices", said)
    assert "gathered" not in refscore_here(tmp_path, *asked)
    answer = answer_of(tmp_path, *asked, "--devices", 2)
    assert (answer["devices"], answer["fits"]) == (2, True)
    assert answer["bytes"]["gathered"] > 0


def test_what_is_too_large_is_told_how_many_devices_hold_it(tmp_path, tiny_model):
    config, plan = of(tmp_path, tiny_model)
    four, two = (of_process(outlook(config, plan, "cuda", n).training.total, "cuda") for n in (4, 2))
    asked = ("plan", "--config", tmp_path / "experiment.yaml")
    between = ("--gpu-memory", (four + two) / 2)
    said = refscore_here(tmp_path, *asked, *between)
    assert "or as it is on 4 devices (--devices 4): 0.8 GiB on each" in said
    answer = answer_of(tmp_path, *asked, *between, "--devices", 2)
    assert (answer["fits"], answer["fits_on_devices"]) == (False, 4)
    said = refscore_here(tmp_path, *asked, "--gpu-memory", 0.5)
    assert "on more devices, as it is, not at all: it is too large for each of 64" in said
    said = refscore_here(tmp_path, *asked, *between, "--set", "train.optimizer=adafactor")
    assert "too large" not in said or "not at all: training on" in said


def test_processes_on_processors_share_a_memory(tmp_path, tiny_model):
    config = experiment(tmp_path, tiny_model, write_rows(tmp_path / "preferences.jsonl", preference_rows(8)))
    one, two = (answer_of(tmp_path, "plan", "--config", config, "--devices", n)["of_gib"] for n in (1, 2))
    assert two == one / 2


def test_the_length_that_fits_is_that_of_as_many_devices(tmp_path, tiny_model):
    rows = [*preference_rows(8), {"prompt": "Hi?", "chosen": "cat " * 200, "rejected": "dog " * 200}]
    path = experiment(tmp_path, tiny_model, write_rows(tmp_path / "d.jsonl", rows))
    config = load_config(
        path, ["data.max_length=2000", "train.tokens_per_batch=64", "train.gradient_checkpointing=true"]
    )
    plan = make_plan(config)
    seen = outlook(config, plan, "cuda", 2)
    assert seen.tokens_per_pass == seen.longest > 300
    shorter = of_process(outlooks.again(config, seen, 200).total, "cuda")
    length = length_that_fits(config, plan, seen, shorter)
    assert length is not None
    prompts, responses = plan.pairs.prompt_tokens, plan.pairs.response_tokens.reshape(-1, 2)
    kept = (prompts + responses.max(1)) <= length
    assert 0 < kept.sum() < len(prompts)
    assert int((prompts + responses.sum(1) - 2)[kept].max()) <= 220
