"""Who computed a score and of what: `reference_id` and `key`.

`reference_id` is a digest of weight bytes, the architecture part of config.json and the numerics; never of a name.
`key` is a digest of the reference and of token ids with the boundary between prompt and response. Token ids already
contain tokenizer, chat template, system prompt and truncation, so nothing else needs hashing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.digests import files_sha256

VERSION = 1
# what config.json says without changing a single logit
_COSMETIC = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "pad_token_id",
}


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
    """What was hashed, in clear. `weights` and `adapter` map safetensors file names to sha256."""

    weights: dict[str, str]
    architecture: dict[str, Any]
    numerics: Numerics
    adapter: dict[str, str] = field(default_factory=dict)

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

    def described(self) -> dict[str, Any]:
        """The content of reference.json."""
        return {
            "version": VERSION,
            "weights": self.weights,
            **({"adapter": self.adapter} if self.adapter else {}),
            "architecture": self.architecture,
            "numerics": dict(vars(self.numerics)),
        }

    @classmethod
    def from_described(cls, content: dict[str, Any]) -> ReferenceIdentity:
        """The inverse of `described`."""
        numerics = Numerics(**content["numerics"])
        return cls(content["weights"], content["architecture"], numerics, content.get("adapter", {}))


def identify(directory: Path, numerics: Numerics, adapter: Path | None = None) -> ReferenceIdentity:
    """Read a model directory's identity, and its adapter's; hashes weights not seen before."""
    digests = adapter_digests(adapter) if adapter else {}
    return ReferenceIdentity(weight_digests(directory), architecture(directory), numerics, digests)


def adapter_digests(adapter: Path) -> dict[str, str]:
    """sha256 of a PEFT adapter's weights and of its configuration, which scales them."""
    digests = files_sha256([*sorted(adapter.glob("*.safetensors")), adapter / "adapter_config.json"])
    return {path.name: digest for path, digest in digests.items()}


def weight_digests(directory: Path) -> dict[str, str]:
    """sha256 of each safetensors file, by file name."""
    digests = files_sha256(sorted(directory.glob("*.safetensors")))
    return {path.name: digest for path, digest in digests.items()}


def weights_digest(directory: Path) -> str:
    """One digest of all weight files of a directory."""
    return hashlib.sha256(_canonical(weight_digests(directory)).encode()).hexdigest()


def architecture(directory: Path) -> dict[str, Any]:
    """config.json without what changes no logit."""
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in _COSMETIC}


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
