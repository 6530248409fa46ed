"""Models of the sizes that people train: their shapes, and directories with random weights of that shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
QWEN_8B = LLAMA_8B | {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288,
    "num_hidden_layers": 36,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"Llama-3.2-1B": LLAMA_1B, "Llama-3.1-8B": LLAMA_8B, "Qwen3-8B": QWEN_8B}


def write_random_model(shape: dict[str, Any], directory: Path, tokenizer: Path, device: str) -> None:
    """A model of `shape` with random bfloat16 weights, made on `device`, and the tokenizer that lies in `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape))
    config = AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, directory)
