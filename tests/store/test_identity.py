"""Keys: golden vectors, and what must and must not move them."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from pipeline.models.identity import ModelIdentity, adapter_digests, architecture, identify_model, weights_digest
from pipeline.store.identity import Numerics, ReferenceIdentity, identify, score_key

NUMERICS = Numerics("vllm", "0.32.0", "cpu", "float32", "float32")
GOLDEN = ReferenceIdentity(
    ModelIdentity({"model.norm.weight": "ab" * 32}, {"model_type": "llama", "hidden_size": 64}), NUMERICS
)


def test_golden_vectors():
    """Written down once: a change here throws every user's store away."""
    assert GOLDEN.reference_id == "7a147334b0a8c2fddb9b3b47c9b795792a6fb105181b4a4cd7dfb3132f02272e"
    assert (
        score_key("00" * 32, [1, 2, 3], [4, 5]).hex()
        == "ba277b24ab806be64b5d74c7e339079c0c6431cd46e2b80702e21ca35cbd1dea"
    )
    assert (
        score_key("00" * 32, [], [2**31 - 1]).hex()
        == "bc38813d3749aa9e84008a4ebb36b5ff33b74cb1e80f42d6e48a7457f6e991cb"
    )


def test_everything_that_is_described_is_hashed_under_its_name_and_read_back():
    model = ModelIdentity(GOLDEN.model.weights, {"model_type": "é"}, {"a": "cd" * 32}, {"m.py": "ef" * 32})
    full, bare = (replace(GOLDEN, model=one) for one in (model, replace(model, adapter={}, code={})))
    described = {
        "version": 2,
        "weights": {"model.norm.weight": "ab" * 32},
        "adapter": {"a": "cd" * 32},
        "code": {"m.py": "ef" * 32},
        "architecture": {"model_type": "é"},
        "numerics": {
            "engine": "vllm", "engine_version": "0.32.0", "device": "cpu", "dtype": "float32", "logits_dtype": "float32",
            "quantization": "none",
        },
    }  # fmt: skip
    assert full.described() == described
    plain = {name: value for name, value in described.items() if name not in ("adapter", "code")}
    assert bare.described() == plain
    for one, content in ((full, described), (bare, plain)):
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert one.reference_id == hashlib.sha256(text.encode()).hexdigest()
        assert "\\u00e9" in text
        assert ReferenceIdentity.from_described(content) == one
        del content["numerics"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert one.model.digest == hashlib.sha256(text.encode()).hexdigest()
    weights = json.dumps([model.weights, model.adapter], sort_keys=True, separators=(",", ":"))
    assert model.weights_digest == hashlib.sha256(weights.encode()).hexdigest()


def test_weights_alone_are_one_digest_for_reference_and_policy(tiny_model, tmp_path):
    assert weights_digest(tiny_model) == identify_model(tiny_model).weights_digest
    assert identify_model(tiny_model) == identify(tiny_model, NUMERICS).model
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    with_it = identify(tiny_model, NUMERICS, adapter)
    assert identify_model(tiny_model, adapter) == with_it.model
    assert with_it.model.digest != identify_model(tiny_model).digest
    assert with_it.model.weights_digest != weights_digest(tiny_model)


def test_code_is_part_of_a_model_if_it_is_run(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "coded")
    edit(model, auto_map={"AutoModelForCausalLM": "m.Model"})
    (model / "m.py").write_text("one = 1")
    run = identify_model(model, trusts_code=True)
    assert run == identify(model, NUMERICS, trusts_code=True).model
    assert identify_model(model) == identify_model(model, trusts_code=False) != run


ROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("said", "inert"),
    [
        ({"rope_theta": 1e4}, True),
        ({"rope_theta": 1e4, "rope_scaling": None}, True),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, False),
        ({}, False),  # learned positions, as far as one can tell
        ({"rope_scaling": None}, False),
        ({"rope_parameters": ROPE}, True),
        ({"rope_parameters": {"rope_theta": 1e4}}, True),
        ({"rope_parameters": ROPE | {"rope_type": "linear"}}, False),
        ({"rope_parameters": {"full": ROPE, "sliding": {"rope_theta": 1e4}}}, True),
        ({"rope_parameters": {"full": ROPE, "sliding": ROPE | {"rope_type": "linear"}}}, False),
        ({"rope_parameters": {"full": ROPE, "factor": 2.0}}, False),
        ({"rope_parameters": ROPE, "rope_scaling": {"type": "linear"}}, False),
    ],
)
@pytest.mark.parametrize("nested", [None, "text_config", "thinker_text_config"])
def test_the_number_of_positions_counts_unless_nothing_but_a_limit_is_read_from_it(tmp_path, said, inert, nested):
    content = {"model_type": "llama", "max_position_embeddings": 512, "use_cache": True, "hidden_size": 8, **said}
    config = {"model_type": "x", nested: content} if nested else content
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = architecture(tmp_path)[nested] if nested else architecture(tmp_path)
    assert ("max_position_embeddings" in found) != inert
    assert found["hidden_size"] == 8
    assert "use_cache" not in found


def test_only_the_text_models_part_is_read_for_what_moves_nothing(tmp_path):
    config = {
        "model_type": "x",
        "vision_config": {"use_cache": True},
        "text_config": None,
        "rope_theta": {"dropout": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture(tmp_path) == config


def test_an_adapters_layers_are_a_set(tiny_model, tmp_path):
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    path = adapter / "adapter_config.json"

    def digests(**values):
        content = json.loads(path.read_text())
        content.pop("target_modules", None)
        path.write_text(json.dumps(content | values))
        return adapter_digests(adapter)

    one, turned = (digests(target_modules=names) for names in (["q_proj", "v_proj"], ["v_proj", "q_proj"]))
    assert one == turned
    assert "adapter_config.json" in one
    others = [digests(), digests(target_modules="q_proj"), digests(target_modules=["q_proj"])]
    assert len({json.dumps(found) for found in [one, *others]}) == 4


def test_the_key_knows_the_boundary_the_order_and_every_token():
    base = score_key("00" * 32, [1, 2, 3], [4, 5])
    others = [
        score_key("00" * 32, [1, 2], [3, 4, 5]),
        score_key("00" * 32, [1, 2, 3, 4], [5]),
        score_key("00" * 32, [4, 5], [1, 2, 3]),
        score_key("00" * 32, [1, 2, 3], [4, 6]),
        score_key("00" * 31 + "01", [1, 2, 3], [4, 5]),
    ]
    assert len({base, *others}) == 6


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_one_bit_of_the_weights_changes_the_reference(model):
    before = identify(model, NUMERICS).reference_id
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identify(model, NUMERICS).reference_id != before


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"engine": "transformers"},
        {"engine_version": "0.33.0"},
        {"device": "cuda"},
        {"quantization": "fp8"},
    ],
)
def test_numerics_change_the_reference(model, change):
    other = Numerics(**{**vars(NUMERICS), **change})
    assert identify(model, other).reference_id != identify(model, NUMERICS).reference_id


def edit(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_the_architecture_says_changes_the_reference_and_cosmetics_do_not(model):
    before = identify(model, NUMERICS).reference_id
    edit(model, _name_or_path="elsewhere", transformers_version="9", use_cache=False)
    assert identify(model, NUMERICS).reference_id == before
    edit(model, rms_norm_eps=1e-3)
    assert identify(model, NUMERICS).reference_id != before


def test_copying_or_renaming_the_directory_changes_nothing(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "a copy with spaces")
    assert identify(copy, NUMERICS).reference_id == identify(model, NUMERICS).reference_id


def make_adapter(model, where, scale=1.0):
    """A LoRA adapter in PEFT's layout with weights that do something."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * scale)
    adapted.save_pretrained(where)
    return where


def test_an_adapter_is_part_of_the_identity(model, tmp_path):
    adapter = make_adapter(model, tmp_path / "adapter")
    with_it = identify(model, NUMERICS, adapter)
    assert with_it.reference_id != identify(model, NUMERICS).reference_id
    assert ReferenceIdentity.from_described(with_it.described()) == with_it
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 99}))
    assert identify(model, NUMERICS, adapter).reference_id != with_it.reference_id


def test_a_merged_adapter_scores_as_peft_does(model, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipeline.config.experiment import ReferenceConfig
    from pipeline.engines.protocol import Request, numerics_of
    from pipeline.engines.start import start_scorer
    from pipeline.errors import ConfigError
    from pipeline.models.locate import locate_reference

    adapter = make_adapter(model, tmp_path / "adapter")
    reference = ReferenceConfig(model=str(model), adapter=str(adapter), engine="transformers")
    paths = locate_reference(reference)
    assert locate_reference(reference).merged == paths.merged
    request = Request([1, 5, 9], [20, 21, 22])
    with start_scorer(reference, paths.merged, numerics_of(reference), 10) as scorer:
        (ours,) = scorer.score([request])
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter
    ).eval()
    ids = torch.tensor([[1, 5, 9, 20, 21, 22]])
    with torch.no_grad():
        logps = adapted(ids).logits[0].log_softmax(-1)[2:5].gather(1, ids[0, 3:, None])[:, 0]
        adapted.disable_adapter_layers()
        plain = adapted(ids).logits[0].log_softmax(-1)[2:5].gather(1, ids[0, 3:, None])[:, 0]
    assert abs(logps - torch.tensor(ours)).max() < 1e-4
    assert abs(logps - plain).max() > 1e-2
    with pytest.raises(ConfigError, match="no PEFT adapter"):
        locate_reference(reference.model_copy(update={"adapter": str(model)}))


def test_bases_of_equal_weights_and_another_configuration_are_merged_apart(model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.config.experiment import ReferenceConfig
    from pipeline.models.locate import locate_reference

    adapter = make_adapter(model, tmp_path / "adapter")
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content["rope_parameters"]["rope_theta"] = 77.0
    (other / "config.json").write_text(json.dumps(content))
    merged = [
        locate_reference(ReferenceConfig(model=str(base), adapter=str(adapter))).merged for base in (model, other)
    ]
    assert merged[0] != merged[1]
    ids = torch.arange(12)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in merged)
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_whatever_is_merged_or_copied_along_decides_where_it_is_kept(model, tmp_path, file):
    from pipeline.config.experiment import ReferenceConfig
    from pipeline.models.locate import locate_reference

    adapter = make_adapter(model, tmp_path / "adapter")
    reference = ReferenceConfig(model=str(model), adapter=str(adapter))
    before = locate_reference(reference).merged
    content = (model / file).read_text()
    (model / file).write_text(content.replace("{", '{"more": 1,' if file == "config.json" else "{ ", 1))
    assert locate_reference(reference).merged != before


def test_a_reference_of_another_version_is_a_message():
    from pipeline.errors import DataError

    with pytest.raises(DataError, match="version 1"):
        ReferenceIdentity.from_described({**GOLDEN.described(), "version": 1})
    with pytest.raises(DataError, match="describes no reference"):
        ReferenceIdentity.from_described({"version": 2})
