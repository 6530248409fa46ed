"""What a model is, whatever computes with it: digests of its tensors, of what its configuration says, its code, an adapter.

Names of files and models, how tensors are spread over files, and configuration fields that move no logit count for nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.digests import files_sha256, json_sha256
from pipeline.models.configuration import read_config, read_json
from pipeline.models.weights import digests_of_files, tensor_digests

# of what is digested here and in `pipeline.store.identity`: another version gives other ids
VERSION = 2
# What config.json says without moving a logit of a forward pass in evaluation mode; each is tried by a test. What is not
# listed counts. `architectures` is not: vLLM chooses its code by it.
INERT = frozenset(
    {
        "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
        "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
        "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "activation_dropout", "dropout",
        "attn_pdrop", "embd_pdrop", "resid_pdrop", "layerdrop", "classifier_dropout",
        "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
        "output_attentions", "output_hidden_states", "return_dict", "router_aux_loss_coef", "output_router_logits",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }
)  # fmt: skip
# what an adapter's configuration says of its past
_INERT_OF_ADAPTER = {
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "task_type",
}
# files that make a tokenizer, its template included
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
)
# files beside config.json that say how weights are quantised
_QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class ModelIdentity:
    """What was hashed, in clear. `weights` and `adapter` map names of tensors to digests, `code` names of files."""

    weights: dict[str, str]
    architecture: dict[str, Any]
    adapter: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    @property
    def weights_digest(self) -> str:
        """sha256 (hex) of the weights alone: equal for a reference and a policy that starts from it."""
        return json_sha256([self.weights, self.adapter] if self.adapter else self.weights)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of `described`."""
        return json_sha256(self.described())

    def described(self) -> dict[str, Any]:
        """Everything that is hashed; what is empty is left out."""
        return {
            "version": VERSION,
            "weights": self.weights,
            **({"adapter": self.adapter} if self.adapter else {}),
            **({"code": self.code} if self.code else {}),
            "architecture": self.architecture,
        }


def identify_model(directory: Path, adapter: Path | None = None, *, trusts_code: bool = False) -> ModelIdentity:
    """Read a model directory's identity, and its adapter's; hashes weights that were not seen before.

    `trusts_code`: code that comes with the model is run, if config.json names some. Raises ConfigError for weights or a
    configuration that cannot be read.
    """
    adapted = adapter_digests(adapter) if adapter else {}
    code = code_digests(directory) if trusts_code and "auto_map" in read_config(directory) else {}
    return ModelIdentity(tensor_digests(directory), architecture(directory), adapted, code)


def adapter_digests(adapter: Path) -> dict[str, str]:
    """Digests of a PEFT adapter's tensors, and of what its configuration says of more than its past."""
    digests = digests_of_files([adapter / "adapter_model.safetensors"])
    content = read_json(adapter / "adapter_config.json")
    kept = {name: value for name, value in content.items() if name not in _INERT_OF_ADAPTER}
    if "target_modules" in kept and isinstance(kept["target_modules"], list):
        kept["target_modules"] = sorted(kept["target_modules"])  # a set, saved in any order
    return {**digests, "adapter_config.json": json_sha256(kept)}


def code_digests(directory: Path) -> dict[str, str]:
    """sha256 of every Python file that comes with a model, by its path below the directory."""
    digests = files_sha256(sorted(directory.rglob("*.py")))
    return {path.relative_to(directory).as_posix(): digest for path, digest in digests.items()}


def weights_digest(directory: Path) -> str:
    """One digest of all tensors that are loaded from a directory."""
    return json_sha256(tensor_digests(directory))


def behaviour_digest(directory: Path) -> str:
    """sha256 (hex) of all that decides what a model says: tensors, configuration, tokenizer, chat template, code."""
    patterns = (*TOKENIZER_FILES, "generation_config.json")
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    tokenizer_files = {file.relative_to(directory).as_posix(): digest for file, digest in files_sha256(files).items()}
    said = [tensor_digests(directory), read_config(directory), tokenizer_files, code_digests(directory)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def architecture(directory: Path) -> dict[str, Any]:
    """What config.json, and files of quantisation beside it, say that may move a logit."""
    quantisation = {name: read_json(directory / name) for name in _QUANTISATION if (directory / name).is_file()}
    return {**_without_inert(read_config(directory)), **quantisation}


def _without_inert(config: dict[str, Any]) -> dict[str, Any]:
    inert = INERT | ({"max_position_embeddings"} if _positions_are_a_limit_only(config) else set())
    return {
        name: _without_inert(value) if isinstance(value, dict) and name.endswith("text_config") else value
        for name, value in config.items()
        if name not in inert
    }


def _positions_are_a_limit_only(config: dict[str, Any]) -> bool:
    """Whether the number of positions moves no number: rotary embeddings that no scaling stretches.

    Learned positions are a tensor of that length, and scalings read it.
    """
    parameters = config.get("rope_parameters")
    if parameters is None:
        return "rope_theta" in config and config.get("rope_scaling") is None
    kinds = parameters.values() if any(isinstance(value, dict) for value in parameters.values()) else [parameters]
    return config.get("rope_scaling") is None and all(
        isinstance(kind, dict) and kind.get("rope_type", "default") == "default" for kind in kinds
    )
