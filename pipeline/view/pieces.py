"""The text of single tokens, for people: what each id stands for, without a model and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts.runs import Run, read_saved_config
from pipeline.view.pages import Stamp, stamp

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def pieces(run: Run, ids: Sequence[int]) -> list[str]:
    """A text per id; the id in angle brackets if no tokenizer of the run is at hand or it does not know the id."""
    tokenizer = _tokenizer_of(run)
    return [_piece(tokenizer, token) for token in ids]


def _piece(tokenizer: Tokenizer | None, token: int) -> str:
    if tokenizer is None or tokenizer.id_to_token(token) is None:
        return f"<{token}>"
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    # a part of a character, whose bytes lie in several tokens, has no text of its own
    return f"<{token}>" if not text or "\ufffd" in text else text


def _tokenizer_of(run: Run) -> Tokenizer | None:
    of_the_reference = _of_the_reference(run, stamp(run.config))
    for path in (run.model / "tokenizer.json", run.adapter / "tokenizer.json", *of_the_reference):
        if there := stamp(path):
            return _read(path, there)
    return None


# a page asks a hundred times, and YAML is slow to read
@lru_cache(maxsize=8)
def _of_the_reference(run: Run, _version: Stamp) -> list[Path]:
    reference = read_saved_config(run).get("reference", {})
    model = reference.get("model") if isinstance(reference, dict) else None
    if not isinstance(model, str) or ":" in model:
        return []
    try:
        return [Path(model).expanduser() / "tokenizer.json"]
    except RuntimeError:  # the home of somebody who is not known here
        return []


@lru_cache(maxsize=4)
def _read(path: Path, _version: Stamp) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # noqa: BLE001  # the library raises plain exceptions for files of any other form
        return None
