"""Adapters, four bits, optimizers and reward models: what learns, what is saved, and that others load it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pipeline.training.save
from pipeline.artifacts.runs import open_run
from pipeline.config.files import load_overrides
from pipeline.errors import CheckError, ConfigError
from pipeline.forward.logps import Hidden
from pipeline.forward.trees import Tree
from pipeline.models.load import load_tokenizer
from pipeline.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from pipeline.training.examples import Pairs
from pipeline.training.optimizers import make_optimizer, update
from pipeline.training.policies import load_policy
from pipeline.training.save import save_policy
from pipeline.training.step import evaluate, train_step
from tests.conftest import make_tiny_model
from tests.training.test_step import rows_of


def config_of(model, *settings):
    base = ["train.precision=float32", "train.learning_rate=0.01", "train.beta=0.5"]
    return load_overrides({"data": {"path": "x"}, "policy": {"model": str(model)}}, [*base, *settings])


def policy_of(model, config, ends=frozenset({0})):
    torch.manual_seed(0)
    return load_policy(model, config, load_tokenizer(model, config.policy), set(ends))


@pytest.fixture
def pairs():
    rows = rows_of(8)
    trees = [Tree(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows]
    ref = [[-3.0 * torch.ones(len(row[side])).numpy() for row in rows] for side in ("chosen_ids", "rejected_ids")]
    return Pairs([f"p{number}" for number in range(8)], trees, *ref)


def steps(policy, optimizer, pairs, config, numbers):
    losses = []
    for _ in numbers:
        losses.append(train_step(policy.forward, pairs, range(8), config.train)["loss"])
        update(policy.model, optimizer, config.train.learning_rate, config.train.max_grad_norm)
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_every_optimizer_learns_and_resumes_without_changing_a_bit(tmp_path, tiny_model, pairs, optimizer):
    config = config_of(tiny_model, f"train.optimizer={optimizer}")
    policy = policy_of(tiny_model, config)
    first = make_optimizer(policy.model, config.train)
    losses = steps(policy, first, pairs, config, range(2))
    save_checkpoint(tmp_path, 2, "t", policy.model, first, 1)
    losses += steps(policy, first, pairs, config, range(2, 5))
    assert losses[-1] < losses[0] - 0.05
    again = policy_of(tiny_model, config)
    second = make_optimizer(again.model, config.train)
    load_checkpoint(newest_checkpoint(tmp_path), again.model, second)
    assert steps(again, second, pairs, config, range(2, 5)) == losses[2:]
    for mine, theirs in zip(again.model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("scale", [0.0, 0.02, 3.0])
def test_a_rate_makes_a_step_of_its_size_whatever_the_weights(optimizer, scale):
    """The root mean square of the first update is the rate: on layers, on large weights, on an adapter's zeros."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 128)
    with torch.no_grad():
        layer.weight.normal_(std=scale) if scale else layer.weight.zero_()
    before = layer.weight.detach().clone()
    rate = 1e-3
    train = load_overrides(
        {"data": {"path": "x"}}, [f"train.optimizer={optimizer}", f"train.learning_rate={rate}"]
    ).train
    chosen = make_optimizer(layer, train)
    layer(torch.randn(32, 64)).square().sum().backward()
    # gradients far larger and far smaller than any clip
    layer.weight.grad.mul_(1e-3)
    update(layer, chosen, rate, 1e9)
    step = (layer.weight - before).square().mean().sqrt().item()
    assert 0.5 * rate < step < 1.1 * rate


def test_optimizers_with_less_state_keep_less(tiny_model, pairs):
    sizes = {}
    for name in ("adamw", "adamw_8bit", "adafactor"):
        config = config_of(tiny_model, f"train.optimizer={name}")
        policy = policy_of(tiny_model, config)
        optimizer = make_optimizer(policy.model, config.train)
        steps(policy, optimizer, pairs, config, range(1))
        # the big matrices: 8-bit moments are for those of 4096 weights and more
        sizes[name] = sum(
            value.numel() * value.element_size()
            for parameter, state in optimizer.state.items()
            if parameter.numel() >= 4096
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")
        )
    assert sizes["adamw_8bit"] < 0.3 * sizes["adamw"]
    assert sizes["adafactor"] < 0.1 * sizes["adamw"]


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


SPOILED = {
    "a weight": ("train.seed=0", "model", lambda tensors: {name: tensor * 1.02 for name, tensor in tensors.items()}),
    "a head": (
        "train.objective=reward",
        "model",
        lambda tensors: {**tensors, "score.weight": tensors["score.weight"] * 0},
    ),
    "an adapter": ("policy.lora={r: 4, alpha: 64}", "adapter", lambda tensors: {n: t * 0 for n, t in tensors.items()}),
    "a merge": ("policy.lora={r: 4, alpha: 64}", "model", lambda tensors: {n: t * 1.02 for n, t in tensors.items()}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_an_export_that_is_not_what_was_trained_fails_and_replaces_nothing(tiny_model, pairs, what, monkeypatch):
    setting, name, spoil = SPOILED[what]
    config = config_of(tiny_model, setting)
    policy = policy_of(tiny_model, config, {branch[-1] for tree in pairs.trees for branch in tree.branches})
    steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3))
    run, tokenizer = open_run("spoiled"), load_tokenizer(tiny_model, config.policy)
    differences = save_policy(policy, tiny_model, config, run, "card", tokenizer, pairs.trees)
    assert name in differences
    assert max(differences.values()) < 1e-4
    (file,) = (run.model if name == "model" else run.adapter).glob("*.safetensors")
    before = file.read_bytes()
    write = pipeline.training.save._save_whole if name == "model" else pipeline.training.save._save_adapter

    def spoiled(model, *others):
        write(model, *others)
        directory = next(other for other in others if isinstance(other, Path) and other != tiny_model)
        (weights,) = directory.glob("*.safetensors")
        save_file(spoil(load_file(weights)), weights, {"format": "pt"})

    monkeypatch.setattr(pipeline.training.save, write.__name__, spoiled)
    with pytest.raises(CheckError, match="not what was trained"):
        save_policy(policy, tiny_model, config, run, "card", tokenizer, pairs.trees)
    assert file.read_bytes() == before
    assert not [path for path in run.directory.iterdir() if path.name.startswith(".tmp")]


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


def test_an_operation_without_a_gradient_stops_training(tiny_model, pairs):
    with torch.library._scoped_library("refscore_test", "DEF") as library:  # undone afterwards
        library.define("copy(Tensor x) -> Tensor")
        library.impl("copy", torch.clone, "CPU")
        config = config_of(tiny_model)
        policy = policy_of(tiny_model, config)
        policy.model.model.layers[0].mlp.register_forward_hook(lambda *args: torch.ops.refscore_test.copy(args[2]))
        with pytest.raises(CheckError, match=r"gradients do not pass .*refscore_test::copy"):
            train_step(policy.forward, pairs, range(8), config.train)


@pytest.mark.parametrize(("setting", "module"), [("policy.load_in_4bit=true", "bitsandbytes"), ("train.optimizer=adamw_8bit", "bitsandbytes.optim")])  # fmt: skip
def test_without_bitsandbytes_the_message_says_what_to_install(tiny_model, monkeypatch, setting, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    config = config_of(tiny_model, "policy.lora={r: 4}", setting)
    with pytest.raises(ConfigError, match="uv pip install bitsandbytes"):
        make_optimizer(policy_of(tiny_model, config).model, config.train)


@pytest.mark.parametrize("lora", [(), ("policy.lora={r: 4}",)])
def test_gradient_checkpointing_changes_memory_not_numbers(tiny_model, pairs, lora):
    found = []
    for setting in ("false", "true"):
        config = config_of(tiny_model, f"train.gradient_checkpointing={setting}", *lora)
        policy = policy_of(tiny_model, config)
        policy.model.train()
        assert policy.model.is_gradient_checkpointing == (setting == "true")
        found.append(steps(policy, make_optimizer(policy.model, config.train), pairs, config, range(3)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("lora", [(), ("policy.lora={r: 4, alpha: 64}",)])
def test_a_reward_model_learns_and_transformers_reads_the_same_scores(tiny_model, pairs, lora, layout):
    config = config_of(tiny_model, "train.objective=reward", f"train.layout={layout}", *lora)
    ends = {tree.branches[side][-1] for tree in pairs.trees for side in (0, 1)}
    policy = policy_of(tiny_model, config, ends - {0, 1, 2, 3} | {0})
    optimizer = make_optimizer(policy.model, config.train)
    losses = steps(policy, optimizer, pairs, config, range(12))
    assert losses[-1] < 0.7 * losses[0]
    figures = evaluate(policy.forward, pairs, config.train)
    assert "logps/chosen" not in figures
    run = open_run("reward")
    save_policy(policy, tiny_model, config, run, "card", load_tokenizer(tiny_model, config.policy), pairs.trees)
    model = AutoModelForSequenceClassification.from_pretrained(run.model, dtype=torch.float32).eval()
    policy.model.eval()
    assert model.config.num_labels == 1
    assert model.config.pad_token_id not in ends - {1, 2, 3}
    assert AutoTokenizer.from_pretrained(run.model).pad_token_id == model.config.pad_token_id
    with torch.no_grad():
        scores = policy.forward(pairs.trees)
        for tree, found in zip(pairs.trees, scores, strict=True):
            for branch, score in zip(tree.branches, found, strict=True):
                theirs = model(input_ids=torch.tensor([[*tree.trunk, *branch]])).logits
                assert float(theirs) == pytest.approx(float(score), abs=1e-4)


def test_a_vocabulary_without_a_token_to_fill_with_is_refused(tiny_model):
    config = config_of(tiny_model, "train.objective=reward")
    with pytest.raises(ConfigError, match="none is left"):
        policy_of(tiny_model, config, set(range(10)))
