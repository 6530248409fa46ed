"""How much memory stage one's engine holds on one device, by formulas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.experiment import ReferenceConfig
from pipeline.models.configuration import text_config

# rows of logits, and of their log-softmax, that vLLM's V2 runner holds at once
_ROWS = 1024
_GPU_TOKENS, _CPU_TOKENS = 16384, 2048


@dataclass(frozen=True)
class Scoring:
    """Bytes on one device: the model's share, keys and values, logits, and what the layers hold in one forward pass."""

    weights: int
    cache: int
    logits: int
    layers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.logits + self.layers


def scoring_memory(reference: ReferenceConfig, base: Path, dtype: str, longest: int, kind: str) -> Scoring:
    """What scoring sequences of up to `longest` tokens holds on a device of `kind` ("cpu", "cuda"), in `dtype`."""
    config = text_config(base, trusts_code=reference.trust_remote_code)
    width = 4 if dtype == "float32" else 2
    default = _GPU_TOKENS if kind == "cuda" else _CPU_TOKENS
    batched = reference.max_batched_tokens or default
    cache = 0
    if reference.engine == "vllm":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * size * width
        given = reference.kv_cache_gib
        cache = int(given * 2**30) if given else max(2**30, per_token * 4 * max(longest + 1, batched))
    ranks = reference.tensor_parallel_size
    rows = _ROWS if kind == "cuda" else max(256, 2**30 // (8 * config.vocab_size))
    # the widest point of a layer: its input, the residual, and the gated product of its wide part
    layers = batched * width * (4 * config.hidden_size + 3 * config.intermediate_size // ranks)
    return Scoring(_weights(base, width) // ranks, cache // ranks, 2 * rows * config.vocab_size * 4, layers)


def _weights(base: Path, width: int) -> int:
    """Bytes of the weights in the dtype that they are loaded in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return int(sum(parameter.numel() for parameter in model.parameters())) * width
