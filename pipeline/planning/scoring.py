"""How much memory the engines that score and that sample hold on one device, by the rules that size them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.transformers import TOKENS_PER_BATCH
from pipeline.engines.vllm.engine import concurrent, kv_cache_bytes_per_token
from pipeline.engines.vllm.scorer import batched_tokens
from pipeline.models.configuration import text_config

# rows of logits, and of their log-softmax, that vLLM's V2 runner holds at once
_ROWS = 1024


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
    width, ranks = 4 if dtype == "float32" else 2, reference.tensor_parallel_size
    vllm = reference.engine == "vllm"
    default = (
        batched_tokens(config.vocab_size, longest + 1, kind, response_rows=True) if vllm else TOKENS_PER_BATCH[kind]
    )
    batched = reference.max_batched_tokens or default
    cache = 0
    if reference.kv_cache_gib:
        cache = int(reference.kv_cache_gib * 2**30)
    elif vllm:
        cache = max(2**30, kv_cache_bytes_per_token(config, dtype) * 4 * max(longest + 1, batched) // ranks)
    rows = _ROWS if kind == "cuda" else batched
    # the widest point of a layer: its input, the residual, and the gated product of its wide part
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layers = batched * width * (4 * config.hidden_size + 3 * wide // ranks)
    return Scoring(_weights(base, width) // ranks, cache, 2 * rows * config.vocab_size * 4, layers)


def sampling_memory(base: Path, dtype: str, longest: int, *, trusts_code: bool) -> Scoring:
    """What sampling sequences of up to `longest` tokens holds here; on a GPU the cache takes what is free, this or more."""
    config = text_config(base, trusts_code=trusts_code)
    width, rows = 4 if dtype == "float32" else 2, concurrent()
    cache = max(2**29, int(1.1 * kv_cache_bytes_per_token(config, dtype) * (longest + 1) * rows))
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layers = max(4096, longest + 1) * width * (4 * config.hidden_size + 3 * wide)
    return Scoring(_weights(base, width), cache, 2 * rows * config.vocab_size * 4, layers)


def _weights(base: Path, width: int) -> int:
    """Bytes of the weights in the dtype that they are loaded in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return int(sum(parameter.numel() for parameter in model.parameters())) * width
