"""No silent no-op: changing any field of `train` and `policy` changes a metric, an artifact or what is computed."""

import hashlib
import shutil
from functools import partial
from importlib import import_module

import huggingface_hub.constants
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.forward.routes
from pipeline.config.experiment import Config
from pipeline.config.training import LoraConfig, PolicyConfig, TrainConfig
from tests.conftest import experiment, make_tiny_model, preference_rows, refscore_here, write_rows
from tests.hub import CODED, SECOND, make_hub

# stands for a base that was saved in bfloat16
ROUNDED = "rounded"
# field: the change, and what must be set beside it (in both runs) for the field to have a meaning
CHANGES = {
    "train.objective": ("reward", {}),
    "train.beta": (0.5, {}),
    "train.loss_type": ("ipo", {}),
    "train.loss_weights": ([0.5, 2.0], {"train.loss_type": ["sigmoid", "sft"]}),
    "train.label_smoothing": (0.2, {}),
    "train.f_divergence_type": ("forward_kl", {}),
    "train.f_alpha_divergence_coef": (0.2, {"train.f_divergence_type": "alpha_divergence"}),
    "train.ld_alpha": (0.1, {}),
    "train.use_weighting": (True, {}),
    "train.discopop_tau": (1.0, {"train.loss_type": "discopop"}),
    "train.simpo_gamma": (2.0, {"train.loss_type": "simpo"}),
    "train.cpo_alpha": (0.1, {"train.loss_type": "cpo"}),
    "train.rpo_eta": (2.0, {"train.loss_type": "rpo_sq"}),
    "train.desirable_weight": (2.0, {"train.loss_type": "bco"}),
    "train.undesirable_weight": (2.0, {"train.loss_type": "bco"}),
    "train.margin_scale": (2.0, {"train.objective": "reward"}),
    "train.layout": ("separate", {}),
    "train.precision": ("bfloat16", {}),
    "train.optimizer": ("adafactor", {}),
    "train.learning_rate": (1e-4, {}),
    "train.lr_scheduler_type": ("constant", {}),
    "train.warmup_ratio": (0.5, {}),
    "train.weight_decay": (0.5, {}),
    "train.max_grad_norm": (0.01, {}),
    "train.per_device_train_batch_size": (3, {}),
    "train.per_device_eval_batch_size": (1, {}),
    "train.tokens_per_batch": (30, {}),
    "train.gradient_accumulation_steps": (1, {}),
    "train.num_train_epochs": (1.5, {"train.max_steps": -1}),
    "train.max_steps": (2, {}),
    "train.gradient_checkpointing": (True, {}),
    "train.activation_offloading": (True, {}),
    "train.optimizer_in_backward": (True, {"train.max_grad_norm": "null"}),
    "train.torch_compile": (True, {}),
    "train.seed": (7, {}),
    "train.logging_steps": (2, {}),
    "train.report_to": ([], {}),
    "train.eval_steps": (2, {}),
    "train.save_steps": (1, {"train.save_total_limit": 3}),
    "train.save_total_limit": (2, {"train.save_steps": 1}),
    "train.async_save": (True, {"train.save_steps": 1}),
    "policy.model": (None, {}),  # filled in below
    "policy.revision": (SECOND, {"policy.model": "tests/tiny"}),
    "policy.trust_remote_code": (True, {"policy.model": "tests/tiny", "policy.revision": CODED}),
    "policy.lora": ({"r": 2}, {}),
    "policy.dtype": ("bfloat16", {"train.precision": "bfloat16"}),
    "policy.save_dtype": ("base", {"policy.model": ROUNDED}),
    "policy.max_shard_size": ("100KB", {}),
    "policy.load_in_4bit": (True, {"policy.lora": {"r": 2}}),
    "policy.lora.r": (4, {"policy.lora": {"r": 2}}),
    "policy.lora.alpha": (8.0, {"policy.lora": {"r": 2}}),
    "policy.lora.dropout": (0.5, {"policy.lora": {"r": 2}}),
    "policy.lora.target_modules": (["q_proj"], {"policy.lora": {"r": 2}}),
    "policy.lora.merge": (False, {"policy.lora": {"r": 2}}),
}


def test_every_field_is_walked():
    fields = {f"train.{name}" for name in TrainConfig.model_fields} | {
        f"policy.{name}" for name in PolicyConfig.model_fields
    }
    fields |= {f"policy.lora.{name}" for name in LoraConfig.model_fields}
    # a section of its own, by test_every_policy_gradient_option
    fields -= {"train.policy_gradient"}
    assert fields == CHANGES.keys()


def test_every_section_is_walked():
    """By this file, and by test_every_input_option, _eval_option, _rollout_option, _policy_gradient_option and _judge_option."""
    assert Config.model_fields.keys() == {"data", "reference", "policy", "train", "generate", "rollout", "judge"}


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tiny_model):
    """A directory with scored pairs, and a memory of what runs without a change gave."""
    where = tmp_path_factory.mktemp("options")
    rows = [{**row, "margin": 0.5 + number % 3} for number, row in enumerate(preference_rows(14))]
    data = write_rows(where / "preferences.jsonl", rows)
    train = {"max_steps": 3, "save_steps": 0, "eval_steps": 0}
    config = experiment(where, tiny_model, data, train=train)
    # several held-out pairs, so that how they are grouped shows
    config.write_text(config.read_text().replace("eval_fraction: 0.25", "eval_fraction: 0.5"))
    refscore_here(where, "precompute", "--config", config, "--run", "scored")
    other = make_tiny_model(where / "other", seed=1)
    make_hub(where / "hub", tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    shutil.copytree(tiny_model, where / ROUNDED)
    model.save_pretrained(where / ROUNDED)
    return where, config, other, {}


@pytest.mark.parametrize("field", CHANGES)
def test_changing_it_changes_something(ground, field, monkeypatch):
    where, config, other, known = ground
    value, beside = CHANGES[field]
    value = str(other) if field == "policy.model" else value
    beside = {name: str(where / ROUNDED) if setting == ROUNDED else setting for name, setting in beside.items()}
    name = repr(beside)
    if name not in known:
        known[name] = outcome(where, config, f"base{len(known)}", beside, monkeypatch)
    assert outcome(where, config, field.replace(".", "-"), {**beside, field: value}, monkeypatch) != known[name]


def outcome(where, config, run, settings, monkeypatch):
    """Metrics without times, artifacts, weights, how many tokens each forward pass read, and what ways of saving memory ran."""
    passes, ways = [], []
    packed = pipeline.forward.routes.read_packed
    layers = []
    with monkeypatch.context() as patch:
        from transformers.models.llama.modeling_llama import LlamaMLP

        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(where / "hub"))
        mlp = LlamaMLP.forward
        patch.setattr(LlamaMLP, "forward", lambda *each: layers.append(1) or mlp(*each))
        for module, way in (
            ("loop", "offloaded_activations"),
            ("train", "StepInBackward"),
            ("saver", "copied"),
            ("policies", "compile_layers"),
        ):
            original = getattr(import_module(f"pipeline.training.{module}"), way)
            # compiling takes long, and that it changes no number is tested beside it
            stub = partial(counted, ways, way, (lambda _: 1) if way == "compile_layers" else original)
            patch.setattr(f"pipeline.training.{module}.{way}", stub)
        patch.setattr(
            pipeline.forward.routes,
            "read_packed",
            lambda model, trees: passes.append(sum(map(len, trees))) or packed(model, trees),
        )
        arguments = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        refscore_here(where, "train", "--config", config, "--run", run, *arguments)
    directory = where / "data/runs" / run
    metrics = pl.read_parquet(directory / "metrics.parquet").select(
        pl.exclude("step_seconds", "tokens_per_second", "peak_memory_gib")
    )
    # names of TensorBoard's files say when they were made
    files = sorted(
        {
            "tensorboard" if "tensorboard" in path.parts else str(path.relative_to(directory))
            for path in directory.rglob("*")
            if path.is_file()
        }
    )
    weights = [
        hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("model/model.safetensors", "adapter/adapter_model.safetensors")
        if (directory / name).is_file()
    ]
    return metrics.write_csv(), files, weights, passes, len(layers), sorted(set(ways))


def counted(ways, way, function, *arguments):
    ways.append(way)
    return function(*arguments)
