"""Whatever is changed in a model's directory: its identity changes, or its logits are equal to the last bit."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.identity import INERT
from pipeline.models.load import Named
from pipeline.models.locate import locate
from pipeline.store.identity import Numerics, identify
from tests.conftest import make_tiny_model

NUMERICS = Numerics("transformers", "5", "cpu", "float32", "float32")
IDS = torch.tensor([[5, 9, 40, 41, 7, 100, 3, 5, 60, 61, 62, 63]])
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def of_family(family, where):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    names = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**names, "vocab_size": 128})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(where)
    return where


def logits(directory):
    """Logits of the model, or why it cannot be loaded; either is what a user would get."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(IDS, use_cache=False, return_dict=True).logits
    except Exception as error:  # noqa: BLE001
        return type(error).__name__


def same(one, other):
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one is other
    )


def other_values(value):
    """Values of the same kind that are not `value`."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2]
    if isinstance(value, float):
        return [value / 2 + 0.125, 0.0]
    if isinstance(value, str):
        return [value + "x"]
    if value is None:
        return [1, 0.5]
    if isinstance(value, dict):
        return [{**value, name: other} for name, inner in value.items() for other in other_values(inner)]
    return [[*value, "x"]]


def written(where, content):
    (where / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_every_field_of_config_json_counts_or_moves_no_logit(family, tmp_path):
    where = of_family(family, tmp_path / family)
    content = json.loads((where / "config.json").read_text())
    before, expected = identify(where, NUMERICS).reference_id, logits(where)
    assert isinstance(expected, torch.Tensor)
    # what is listed as inert is tried also if this architecture's file does not say it
    tried = {**dict.fromkeys(sorted(INERT)), **content}
    uncounted = set()
    for name, value in tried.items():
        for other in other_values(value):
            written(where, {**content, name: other})
            if identify(where, NUMERICS).reference_id == before:
                uncounted.add(name)
                found = logits(where)
                assert isinstance(found, str) or torch.equal(found, expected), f"{name}: {value!r} -> {other!r}"
    assert uncounted <= INERT | {"max_position_embeddings"}
    assert len(uncounted) > 10


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn"])
def test_positions_count_if_a_scaling_reads_them(rope, tmp_path):
    scaling = {"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0}
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=8, rope_parameters=scaling)
    before = identify(model, NUMERICS).reference_id
    content = json.loads((model / "config.json").read_text())
    written(model, {**content, "max_position_embeddings": 16})
    assert identify(model, NUMERICS).reference_id != before


def test_every_file_counts_or_moves_no_logit(tmp_path):
    where = make_tiny_model(tmp_path / "model")
    (where / "hf_quant_config.json").write_text('{"quantization": {}}')
    before, expected = identify(where, NUMERICS).reference_id, logits(where)
    draw = random.Random(0)
    for file in sorted(where.iterdir()):
        sound = file.read_bytes()
        for _ in range(6):
            content = bytearray(sound)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            try:
                now = identify(where, NUMERICS).reference_id
            except ConfigError:
                continue  # said, not scored
            assert now != before or same(logits(where), expected) or isinstance(logits(where), str), file.name
        file.write_bytes(sound)
    assert identify(where, NUMERICS).reference_id == before


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "model")


def sharded(model):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def with_another_header(model):
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", {"format": "pt", "made": "anew"})


def renamed(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def with_the_tied_head_too(model):
    tensors = load_file(model / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def with_an_unused_file(model):
    save_file({"model.norm.weight": torch.zeros(64)}, model / "unused.safetensors")


REWRITES = [sharded, with_another_header, renamed, with_the_tied_head_too, with_an_unused_file]


@pytest.mark.parametrize("rewrite", REWRITES)
def test_the_same_weights_written_otherwise_are_the_same_reference(model, rewrite):
    before, expected = identify(model, NUMERICS), logits(model)
    rewrite(model)
    assert identify(model, NUMERICS) == before
    assert torch.equal(logits(model), expected)


@pytest.mark.engine
def test_vllm_reads_no_file_that_is_not_loaded(model, tmp_path):
    from pipeline.models.locate import only_loaded

    assert only_loaded(model) == model
    with_an_unused_file(model)
    view = only_loaded(model)
    assert {file.name for file in view.iterdir()} == {file.name for file in model.iterdir()} - {"unused.safetensors"}
    assert torch.equal(logits(view), logits(model))


def test_the_index_decides_between_two_files(model):
    tensors = load_file(model / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, model / "other.safetensors", {"format": "pt"})
    (model / "model.safetensors").rename(model / "one.safetensors")
    found = set()
    for file in ("one.safetensors", "other.safetensors"):
        index = {"weight_map": dict.fromkeys(tensors, file)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        found.add(identify(model, NUMERICS).reference_id)
    assert len(found) == 2


def test_two_sets_of_weights_are_refused(model):
    shutil.copy(model / "model.safetensors", model / "other.safetensors")
    tensors = load_file(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "other.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="two sets of weights"):
        identify(model, NUMERICS)


def test_an_index_of_files_that_are_not_there_is_a_message(model):
    (model / "model.safetensors").rename(model / "m.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ConfigError, match=r"gone\.safetensors"):
        identify(model, NUMERICS)


def test_a_head_of_its_own_counts(model):
    before = identify(model, NUMERICS).reference_id
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert identify(model, NUMERICS).reference_id != before


def test_code_that_comes_with_a_model_counts_if_it_is_run(model):
    content = json.loads((model / "config.json").read_text())
    written(model, {**content, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    found = set()
    for text in ("one = 1", "one = 2"):
        (model / "modeling.py").write_text(text)
        found.add(identify(model, NUMERICS, trusts_code=True).reference_id)
        found.add(identify(model, NUMERICS).reference_id)
    assert len(found) == 3


@pytest.mark.parametrize("damage", ["short", "header", "empty"])
def test_weights_that_are_no_safetensors_are_a_message(model, damage):
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"short": content[:-5], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    with pytest.raises(ConfigError, match="fetch it again"):
        identify(model, NUMERICS)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", ["other/code--modeling.Model", [None, "other/code--tokens.Fast"]])
def test_code_of_another_repository_is_refused(model, file, value):
    """No revision of this model says which code that is."""
    spec = Named(str(model), "a" * 40, trust_remote_code=True)
    content = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps({**content, "auto_map": {"AutoX": "modeling.Model", "AutoY": value}}))
    with pytest.raises(ConfigError, match="takes code from other/code, at whatever revision"):
        locate(spec)
    # and none is run if none is trusted
    assert locate(Named(str(model))) == model
    (model / file).write_text(json.dumps({**content, "auto_map": {"AutoX": "modeling.Model"}}))
    assert locate(spec) == model
