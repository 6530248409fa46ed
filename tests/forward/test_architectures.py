"""A walk over decoder families that transformers can build: what is read packed, padded or alone gives what each sequence
gives alone, forward and backward, with windows and limits of positions inside the lengths; or the family is refused by name.

`make architectures` writes the table in tests/architectures.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.forward.logps import forward_of
from pipeline.forward.routes import route_of
from pipeline.forward.trees import Tree
from pipeline.training.policies import without_dropout

TABLE = Path(__file__).parent.parent / "architectures.md"
ROWS: dict[str, tuple[str, str, str, str]] = {}

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 80, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
WINDOW = {"sliding_window": 8}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 24, **ROPE,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
# family: its model_type, and what differs from SIZES
FAMILIES = {
    "Llama": ("llama", {}),
    "Llama, dynamic RoPE": ("llama", {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE}}),
    "Llama, linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "Llama, YaRN": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, **ROPE}}),
    "Llama, LongRoPE": ("llama", {"rope_parameters": LONG}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "Qwen3": ("qwen3", {}),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-Next": ("qwen3_next", {**EXPERTS, "shared_expert_intermediate_size": 32, "num_hidden_layers": 4,
                                  "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}),
    "Mistral": ("mistral", {}),
    "Mistral, window": ("mistral", WINDOW),
    "Mixtral": ("mixtral", {**EXPERTS, **WINDOW, "router_jitter_noise": 0.2}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {**WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "Gemma 3": ("gemma3_text", {**WINDOW, "layer_types": KINDS}),
    "Phi": ("phi", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}),
    "Phi-3, window": ("phi3", {**WINDOW, "resid_pdrop": 0.3}),
    "Phi-3, LongRoPE": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 24, "partial_rotary_factor": 1.0}),
    "PhiMoE, window": ("phimoe", {**EXPERTS, **WINDOW, "attention_bias": True}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {**WINDOW, "layer_types": KINDS}),
    "OLMoE": ("olmoe", EXPERTS),
    "Granite": ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.5}),
    "GraniteMoE": ("granitemoe", EXPERTS),
    "Cohere": ("cohere", {"logit_scale": 0.3}),
    "Cohere 2": ("cohere2", {**WINDOW, "layer_types": KINDS}),
    "GPT-2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 80, "resid_pdrop": 0.3, "attn_pdrop": 0.3}),
    "GPT-Neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 80, "rotary_dim": 8}),
    "GPT-BigCode": ("gpt_bigcode", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 80}),
    "OPT": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 64, "dropout": 0.3, "layerdrop": 0.3}),
    "BLOOM": ("bloom", {"n_head": 4, "n_layer": 2, "hidden_dropout": 0.3}),
    "MPT": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 80}),
    "Falcon": ("falcon", {"head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "Falcon, ALiBi": ("falcon", {"head_dim": None, "alibi": True, "new_decoder_architecture": False}),
    "StableLM": ("stablelm", {}),
    "StarCoder2, window": ("starcoder2", {**WINDOW, "residual_dropout": 0.3}),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "GLM": ("glm", {}),
    "GLM-4": ("glm4", {}),
    "DeepSeek-V2": ("deepseek_v2", {**LATENT, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "topk_method": "greedy"}),
    "DeepSeek-V3": ("deepseek_v3", {**LATENT, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gpt-oss": ("gpt_oss", {**EXPERTS, **WINDOW, "layer_types": KINDS}),
    "Nemotron": ("nemotron", {}),
    "EXAONE 4": ("exaone4", {**WINDOW, "layer_types": KINDS}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Seed-OSS": ("seed_oss", {}),
    "Llama 4": ("llama4_text", {**EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "num_hidden_layers": 4,
                                "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 1, 0]}),
    "Mamba": ("mamba", {"state_size": 4}),
    "Mamba 2": ("mamba2", {"state_size": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "Falcon-Mamba": ("falcon_mamba", {"state_size": 4}),
    "RecurrentGemma": ("recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 64}),
    "Jamba": ("jamba", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4 }),
    "Bamba": ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_chunk_size": 8}),
    "Zamba": ("zamba", {"num_hidden_layers": 5, "mamba_d_state": 4, "n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8}),
}  # fmt: skip
TREES = [
    Tree([*range(3, 14)], ([*range(20, 60)], [70, 71, 72, 73, 74])),
    Tree([7, 8], ([9, 10, 11], [9])),
    Tree([*range(30, 39)], ([*range(60, 72)], [80, 81, 82])),
]


def build(family):
    kind, differing = FAMILIES[family]
    native = any(name in differing for name in ("n_embd", "d_model", "n_heads"))
    sizes = (
        {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
        if native
        else SIZES
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind, **{name: value for name, value in {**sizes, **differing}.items() if value is not None}
        ),
        attn_implementation="eager",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    return model.eval()


def plain(model, tree, branch):
    """Logps by a plain forward of the one sequence, with the attention that the architecture defines."""
    ids = torch.tensor([[*tree.trunk, *branch]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(tree.trunk) - 1 : -1].float()
    return -torch.nn.functional.cross_entropy(logits, ids[0, len(tree.trunk) :], reduction="none")


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_its_sequences_give_alone_or_is_refused_by_name(family):
    model = build(family)
    expected = torch.cat([plain(model, tree, branch) for tree in TREES for branch in tree.branches])
    by_plain = gradients(model, expected)
    try:
        forward = forward_of(model, "tree")
    except ConfigError as refusal:
        assert type(model).__name__ in str(refusal)  # noqa: PT017  # some are refused, some are not
        ROWS[family] = ("refused", str(refusal), "", "")
        return
    ours = torch.cat([logps for tree in forward(TREES) for logps in tree])
    by_us = gradients(model, ours)
    apart, bent = (ours - expected).abs().max().item(), ((by_us - by_plain).norm() / by_plain.norm()).item()
    route = route_of(model, torch.float32)
    ROWS[family] = (route.kind, route.why or "", f"{apart:.1e}", f"{bent:.1e}")
    assert apart < 1e-3
    assert bent < 1e-3
    # under autocast ours may be as far from float32 as a plain forward pass is
    with torch.no_grad():
        coarse = torch.cat([logps for tree in forward_of(model, "tree", torch.bfloat16)(TREES) for logps in tree])
        model.set_attn_implementation("eager")
        with torch.autocast("cpu", torch.bfloat16):
            theirs = torch.cat([plain(model, tree, branch) for tree in TREES for branch in tree.branches])
    assert (coarse - expected).abs().mean() <= 2 * (theirs - expected).abs().mean() + 0.02
    # the budget is about what is read
    assert forward.tokens(TREES) >= sum(map(len, TREES))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_has_no_randomness_of_the_architecture_s_own(family):
    model = build(family)
    without_dropout(model)
    model.train()
    ids = torch.tensor([[*range(3, 43)]])
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_families_whose_ways_are_known():
    """What the walk found once: an architecture that is read in a worse way than before would slow training silently."""
    assert ROWS.keys() == FAMILIES.keys(), "run this file whole: the table is of the walk above"
    kinds = {family: row[0] for family, row in ROWS.items()}
    packed = [
        "Llama",
        "Qwen2, window",
        "Qwen3",
        "Mistral, window",
        "Gemma 2",
        "Gemma 3",
        "OLMo 2",
        "Granite",
        "Cohere",
        "Mixtral",
    ]
    assert {family: kinds[family] for family in packed} == dict.fromkeys(packed, "packed")
    assert kinds["Qwen3-MoE"] == "packed"
    assert kinds["PhiMoE, window"] == "padded"
    assert kinds["Mamba"] == "padded"
    table = "".join(f"| {family} | {' | '.join(row)} |\n" for family, row in ROWS.items())
    print(table)
    if os.environ.get("REFSCORE_WRITE_ARCHITECTURES"):
        TABLE.write_text(
            "# Architectures\n\n`make architectures` builds each family small and at random, with windows of 8 tokens and limits "
            "of positions within\nthe 51 tokens of the longest sequence, and writes this table. Differences are between what "
            "refscore reads and each\nsequence alone in a plain forward pass, in float32: the largest of a log-probability, in "
            "nats, and the relative one of\nthe gradient of all parameters.\n\n"
            f"| family | read | why not packed | logps | gradient |\n|---|---|---|---:|---:|\n{table}"
        )
