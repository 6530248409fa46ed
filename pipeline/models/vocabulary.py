"""Do two tokenizers mean the same by a token id, and write a conversation the same way?"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the map from token to id, added tokens included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
