"""Who computed a score and of what: `reference_id` and `key`.

`reference_id` is a digest of the tensors that are loaded, what config.json says that moves a logit, code that comes with the
model, an adapter, and the numerics; never of a name. `key` is a digest of the reference and of token ids with the boundary
between prompt and response. Token ids already contain tokenizer, chat template, system prompt and truncation, so nothing else
needs hashing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.digests import files_sha256
from pipeline.errors import DataError
from pipeline.models.configuration import read_config, read_json
from pipeline.models.weights import digests_of_files, tensor_digests

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
# files beside config.json that say how weights are quantised
_QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Numerics:
    """How the numbers are computed; everything in here changes the reference's identity."""

    engine: str
    engine_version: str
    device: str
    dtype: str
    logits_dtype: str
    quantization: str = "none"


@dataclass(frozen=True)
class ReferenceIdentity:
    """What was hashed, in clear. `weights` and `adapter` map names of tensors to digests, `code` names of files."""

    weights: dict[str, str]
    architecture: dict[str, Any]
    numerics: Numerics
    adapter: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    @property
    def reference_id(self) -> str:
        """sha256 (hex) of the canonical JSON of `described`."""
        return hashlib.sha256(_canonical(self.described()).encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """sha256 (hex) of the weights alone: equal for a reference and a policy that starts from it."""
        return hashlib.sha256(
            _canonical([self.weights, self.adapter] if self.adapter else self.weights).encode()
        ).hexdigest()

    @property
    def model_digest(self) -> str:
        """sha256 (hex) of all but the numerics: what lies in the model's files, whatever computes with it."""
        described = {name: value for name, value in self.described().items() if name != "numerics"}
        return hashlib.sha256(_canonical(described).encode()).hexdigest()

    def described(self) -> dict[str, Any]:
        """The content of reference.json."""
        return {
            "version": VERSION,
            "weights": self.weights,
            **({"adapter": self.adapter} if self.adapter else {}),
            **({"code": self.code} if self.code else {}),
            "architecture": self.architecture,
            "numerics": dict(vars(self.numerics)),
        }

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> ReferenceIdentity:
        """The inverse of `described`. Raises DataError for what another version wrote, or nobody."""
        if content.get("version") != VERSION:
            raise DataError(
                f"a reference.json of version {content.get('version')}, this refscore writes and reads version {VERSION}: "
                "what it describes is scored again, under an identity of its own"
            )
        try:
            numerics = Numerics(**content["numerics"])
            return cls(
                content["weights"],
                content["architecture"],
                numerics,
                content.get("adapter", {}),
                content.get("code", {}),
            )
        except (KeyError, TypeError):
            raise DataError("a reference.json that describes no reference: remove it, it is written anew") from None


def identify(
    directory: Path, numerics: Numerics, adapter: Path | None = None, *, trusts_code: bool = False
) -> ReferenceIdentity:
    """Read a model directory's identity, and its adapter's; hashes weights not seen before.

    `trusts_code`: code that comes with the model is run, if config.json names some. Raises ConfigError for weights or a
    configuration that cannot be read.
    """
    config = read_config(directory)
    digests = adapter_digests(adapter) if adapter else {}
    code = code_digests(directory) if trusts_code and "auto_map" in config else {}
    return ReferenceIdentity(tensor_digests(directory), architecture(directory), numerics, digests, code)


def model_digest_of(directory: Path, adapter: Path | None = None, *, trusts_code: bool = False) -> str:
    """`ReferenceIdentity.model_digest` of a model that nothing need compute with."""
    return identify(directory, Numerics("", "", "", "", ""), adapter, trusts_code=trusts_code).model_digest


def adapter_digests(adapter: Path) -> dict[str, str]:
    """Digests of a PEFT adapter's tensors, and of what its configuration says of more than its past."""
    digests = digests_of_files([adapter / "adapter_model.safetensors"])
    content = read_json(adapter / "adapter_config.json")
    kept = {name: value for name, value in content.items() if name not in _INERT_OF_ADAPTER}
    if "target_modules" in kept and isinstance(kept["target_modules"], list):
        kept["target_modules"] = sorted(kept["target_modules"])  # a set, saved in any order
    return {**digests, "adapter_config.json": hashlib.sha256(_canonical(kept).encode()).hexdigest()}


def code_digests(directory: Path) -> dict[str, str]:
    """sha256 of every Python file that comes with a model, by its path below the directory."""
    digests = files_sha256(sorted(directory.rglob("*.py")))
    return {path.relative_to(directory).as_posix(): digest for path, digest in digests.items()}


def weights_digest(directory: Path) -> str:
    """One digest of all tensors that are loaded from a directory."""
    return hashlib.sha256(_canonical(tensor_digests(directory)).encode()).hexdigest()


def architecture(directory: Path) -> dict[str, Any]:
    """What config.json, and files of quantisation beside it, say that may move a logit."""
    beside = {name: read_json(directory / name) for name in _QUANTISATION if (directory / name).is_file()}
    return {**_without_inert(read_config(directory)), **beside}


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


def key_of(reference_id: str, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """The 32 bytes under which the logps of `response_ids` after `prompt_ids` are stored.

    sha256 of: "refscore-key", version (u8), reference_id (32 bytes), and both id lists, each as its length (u64) and
    its ids (i32), all little-endian.
    """
    state = hashlib.sha256(b"refscore-key" + bytes([VERSION]) + bytes.fromhex(reference_id))
    for ids in (prompt_ids, response_ids):
        array = np.asarray(ids, dtype="<i4")
        state.update(len(array).to_bytes(8, "little"))
        state.update(array.tobytes())
    return state.digest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
