"""Adapters on a frozen base, of 32 bits and of four: what learns, where, and what is left of it when they are merged."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts.runs import open_run
from pipeline.errors import ConfigError
from pipeline.forward.logps import Hidden
from pipeline.models.load import load_tokenizer
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.optimizers import make_optimizer
from pipeline.training.save import save_policy
from pipeline.training.step import evaluate, train_step
from tests.conftest import make_tiny_model
from tests.training.policy import config_of, policy_of, steps


def test_adapters_learn_alone_and_merge_to_the_same_log_probabilities(tmp_path, tiny_model, pairs, monkeypatch):
    config = config_of(tiny_model, "policy.lora={r: 4, alpha: 8}")
    policy = policy_of(tiny_model, config)
    learning = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("lora_" in name for name in learning)
    optimizer = make_optimizer(policy.model, config.train)
    losses = steps(policy, optimizer, pairs, config, range(4))
    assert losses[-1] < losses[0] - 0.02
    save_checkpoint(tmp_path / "checkpoints", 4, "t", policy.model, optimizer, 1)
    assert set(load_file(tmp_path / "checkpoints/step_000004/model.safetensors")) == set(learning)
    run = open_run("lora")
    save_policy(policy, tiny_model, config, run, "card", load_tokenizer(tiny_model, config.policy), pairs.trees)
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    merged = policy_of(run.model, config_of(run.model))
    policy.model.eval()
    expected, found = (evaluate(each.forward, pairs, config.train) for each in (policy, merged))
    assert found == pytest.approx(expected, abs=1e-4)
    apart = config_of(tiny_model, "policy.lora={r: 4, alpha: 8, merge: false}")
    save_policy(policy, tiny_model, apart, run, "card", load_tokenizer(tiny_model, config.policy), pairs.trees)
    assert not run.model.exists()
    assert (run.adapter / "adapter_config.json").is_file()


def test_target_modules_decide_where_adapters_are(tiny_model):
    policy = policy_of(tiny_model, config_of(tiny_model, "policy.lora={target_modules: [q_proj]}"))
    assert all("q_proj" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="does not fit"):
        policy_of(tiny_model, config_of(tiny_model, "policy.lora={target_modules: [nothing]}"))
    with pytest.raises(ConfigError, match="output layer"):
        policy_of(tiny_model, config_of(tiny_model, "policy.lora={target_modules: [q_proj, lm_head]}"))


def test_embeddings_have_adapters_only_if_the_output_layer_is_its_own(tmp_path, tiny_model, pairs):
    adapters = "policy.lora={r: 4, alpha: 64, target_modules: [q_proj, embed_tokens]}"
    with pytest.raises(ConfigError, match="tied"):
        policy_of(tiny_model, config_of(tiny_model, adapters))
    untied = make_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    config = config_of(untied, adapters)
    policy = policy_of(untied, config)
    steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3))
    tokenizer = load_tokenizer(untied, config.policy)
    assert save_policy(policy, untied, config, open_run("untied"), "card", tokenizer, pairs.trees)["model"] < 1e-4


def test_a_base_of_four_bits_is_exported_with_both_checks(tiny_model, pairs):
    config = config_of(tiny_model, "policy.lora={r: 8, alpha: 64}", "policy.load_in_4bit=true")
    policy = policy_of(tiny_model, config)
    steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3))
    tokenizer = load_tokenizer(tiny_model, config.policy)
    differences = save_policy(policy, tiny_model, config, open_run("four"), "card", tokenizer, pairs.trees)
    assert differences["adapter"] < 0.02
    assert differences["model"] < 1e-4


def test_dropout_falls_on_adapters_while_training_only(tiny_model, pairs):
    config = config_of(tiny_model, "policy.lora={r: 4, dropout: 0.5}")
    policy = policy_of(tiny_model, config)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.model.train()
    assert (
        evaluate(policy.forward, pairs, config.train)["loss"] != evaluate(policy.forward, pairs, config.train)["loss"]
    )
    policy.model.eval()
    assert evaluate(policy.forward, pairs, config.train) == evaluate(policy.forward, pairs, config.train)


def test_both_passes_of_losses_that_sort_pairs_drop_the_same(tiny_model, pairs):
    """With dropout the gradient of a step in several forward passes still fits the logps that were sorted."""
    config = config_of(
        tiny_model, "policy.lora={r: 4, dropout: 0.5}", "train.loss_type=aot", "train.tokens_per_batch=60"
    )
    policy = policy_of(tiny_model, config)
    policy.model.train()
    seen = []
    hidden = policy.forward.hidden
    object.__setattr__(
        policy.forward, "hidden", Hidden(lambda trees: seen.append(hidden.of(trees)) or seen[-1], hidden.tokens)
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    train_step(policy.forward, pairs, range(8), config.train)
    passes = len(seen) // 2
    assert passes > 1
    for first, second in zip(seen[:passes], seen[passes:], strict=True):
        assert torch.equal(first, second)


def test_a_base_of_four_bits_learns_through_its_adapters(tiny_model, pairs):
    config = config_of(tiny_model, "policy.lora={r: 8}", "policy.load_in_4bit=true")
    policy = policy_of(tiny_model, config)
    kinds = {type(module).__name__ for module in policy.model.modules()}
    assert "Params4bit" in {type(p).__name__ for p in policy.model.parameters()}, kinds
    losses = steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(4))
    assert losses[-1] < losses[0] - 0.02


def gradients(policy, pairs, config):
    policy.model.train()
    train_step(policy.forward, pairs, range(8), config.train)
    found = {name: parameter.grad for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    policy.model.zero_grad()
    return found


def test_gradients_through_four_bits_are_those_of_the_same_weights_in_full_even_after_an_evaluation(tiny_model, pairs):
    import bitsandbytes

    config = config_of(tiny_model, "policy.lora={r: 8}", "policy.load_in_4bit=true")
    policy = policy_of(tiny_model, config)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=draw)
    policy.model.eval()
    evaluate(policy.forward, pairs, config.train)
    found = gradients(policy, pairs, config)
    assert len(found) == 28
    for module in policy.model.modules():
        layer = getattr(module, "base_layer", None)
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            full = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            full.weight.data = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            ).float()
            full.weight.requires_grad_(False)
            module.base_layer = full
    for name, wanted in gradients(policy, pairs, config).items():
        assert (found[name] - wanted).norm() < 1e-3 * wanted.norm(), name


def test_float32_is_not_tf32_whatever_a_library_set(tiny_model):
    torch.set_float32_matmul_precision("high")
    try:
        policy_of(tiny_model, config_of(tiny_model))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")
