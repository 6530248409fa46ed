"""The file that holds a judge's own question in place of the built-in one: what stands in it, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ConfigError, first_line

PLACEHOLDERS = ("prompt", "response_a", "response_b")


def read_rubric(path: str) -> str:
    """The file's text. Raises ConfigError if it cannot be read or lacks a placeholder."""
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"rubric {path} cannot be read as UTF-8 text: {first_line(error)}") from None
    missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in text]
    if missing:
        raise ConfigError(
            f"rubric {path} lacks {', '.join(missing)}: write each where the judge is to see that text, as in "
            f"{' '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
        )
    return text
