"""From a model's directory to objects: its tokenizer, its weights; and what two tokenizers must share to be compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelSpec(Protocol):
    """What the configuration says of a model: `reference` and `policy` both fit."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


@dataclass(frozen=True)
class Named:
    """A model that stands in the configuration by nothing but its name."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


def load_tokenizer(directory: Path, spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ConfigError if there is none."""
    from transformers import PreTrainedTokenizerFast

    try:
        if _tokenizer_class(directory) in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            # the class AutoTokenizer would pick, without the four seconds that importing AutoTokenizer takes
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {spec.model!r}: no usable tokenizer in {directory} ({first_line(error)})") from None
    return tokenizer


def load_causal_lm(
    directory: Path, spec: ModelSpec, dtype: torch.dtype | Literal["auto"], **options: Any
) -> PreTrainedModel:
    """The model with its weights in `dtype` ("auto": as they were saved); ConfigError if transformers cannot build it."""
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {spec.model!r}: {directory} cannot be loaded ({first_line(error)})") from None
    return model


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the map from token to id, added tokens included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _tokenizer_class(directory: Path) -> str | None:
    try:
        content = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("tokenizer_class") if (directory / "tokenizer.json").is_file() else None
