"""Models whose weights are read in parts: with all buffers, ties and adapters that reading them whole gives, or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.training.checkpoint import read_parts
from pipeline.training.parallel.unread import NOWHERE, NotInParts, Unread
from pipeline.training.policies import adapted_model
from tests.training.policy import config_of

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SCALED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "llama": {"rope_parameters": SCALED},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    # its embeddings have a factor that no file holds
    "gemma3_text": {},
    # what a layer's output is multiplied by is a buffer that the files hold
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "phi3": {"pad_token_id": 0},
}


def saved(where, name, **settings):
    config = AutoConfig.for_model(name.partition(",")[0], **{**SMALL, **settings})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for held, buffer in model.named_buffers():
        if held in model.state_dict():
            buffer.fill_(0.37)
    model.save_pretrained(where)
    return where


def filled(model, unread):
    """What a process that is alone makes of it."""
    names = unread.forget(model)
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    weights = dict(model.named_parameters())
    model.tie_weights()
    parts = {there: weights[here].detach() for here, there in names.items()}
    read_parts(unread.base, parts, alone=True, files=unread.files)
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_read_in_parts_a_model_is_what_it_is_read_whole(tmp_path, name):
    base = saved(tmp_path, name, **ARCHITECTURES[name])
    # files that nobody loads, with the same names in them, and one that is none
    other = {key: torch.zeros_like(value) for key, value in load_file(base / "model.safetensors").items()}
    save_file(other, base / "model.fp16.safetensors")
    save_file(other, base / "a_copy.safetensors")
    (base / "consolidated.safetensors").write_bytes(b"half")
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **NOWHERE)
    unread = Unread(model, base)
    # nothing that is large is in memory
    assert all(weight.untyped_storage().nbytes() <= 8 for weight in model.parameters())
    model = filled(model, unread)
    tensors, expected = (dict(each.named_parameters()) | dict(each.named_buffers()) for each in (model, whole))
    assert tensors.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == []
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        "tied" in name or "gemma" in name
    )
    ids = torch.arange(3, 80)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_adapters_are_drawn_as_on_a_model_that_is_there(tmp_path):
    base = saved(tmp_path, "llama")
    lora = config_of(base, "policy.lora={r: 4}").policy.lora
    models = {}
    for name, how in (("whole", {}), ("parts", NOWHERE)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **how)
        unread = Unread(model, base) if how else None
        torch.manual_seed(7)
        adapted_model(model, lora, "CAUSAL_LM")
        # chance goes on alike too
        models[name] = (filled(model, unread) if unread else model.eval(), torch.rand(1))
    (whole, after), (parts, again) = models["whole"], models["parts"]
    assert torch.equal(after, again)
    weights, others = dict(whole.named_parameters()), dict(parts.named_parameters())
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert [weight.requires_grad for weight in weights.values()] == [weight.requires_grad for weight in others.values()]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mixtral", {"num_local_experts": 2}), ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 16})],
)
def test_weights_that_are_joined_or_renamed_as_they_are_read_are_refused(tmp_path, name, settings):
    base = saved(tmp_path, name, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **NOWHERE)
    with pytest.raises(NotInParts, match="in another form"):
        Unread(model, base)


def test_a_weight_that_no_file_holds_is_refused(tmp_path):
    base = saved(tmp_path, "llama")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0, **NOWHERE)
    with pytest.raises(NotInParts, match=r"holds score\.weight in another form"):
        Unread(model, base)
