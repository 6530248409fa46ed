"""What a model's config.json says, under one set of names for all architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# what architectures call the number of positions
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model's directory. Raises ConfigError if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}): fetch the model again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no object: fetch the model again")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it stands. Raises ConfigError if it cannot be read."""
    return read_json(directory / "config.json")


def text_config(directory: Path, *, trusts_code: bool = False) -> PretrainedConfig:
    """The configuration of a model's language part, under transformers' names whatever the file calls them.

    Raises ConfigError if transformers knows no such model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusts_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{directory}/config.json is of no model that is known here ({first_line(error)})") from None
    language: PretrainedConfig = config.get_text_config()
    return language


def position_limit(directory: Path) -> int | None:
    """Longest sequence in tokens that the model of config.json has positions for; None if nothing limits it."""
    content = read_config(directory)
    for part in _language_first(content):
        for name in _POSITIONS:
            limit = part.get(name)
            if isinstance(limit, int) and limit > 0:
                return limit
    if "auto_map" in content:
        return None
    # transformers' own default for the architecture, without the seconds of asking for it in the usual case
    limit = getattr(text_config(directory), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def ties_embeddings(directory: Path) -> bool:
    """Whether the output layer is the embeddings, as config.json or transformers' default for the architecture says."""
    content = read_config(directory)
    for part in _language_first(content):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return "auto_map" not in content and bool(getattr(text_config(directory), "tie_word_embeddings", False))


def _language_first(content: dict[str, Any]) -> list[dict[str, Any]]:
    nested = content.get("text_config")
    return [nested, content] if isinstance(nested, dict) else [content]
