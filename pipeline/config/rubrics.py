"""The file that holds a judge's own question in place of the built-in one: what stands in it, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ConfigError, first_line

PLACEHOLDERS = ("prompt", "response_a", "response_b")
# bytes; a question for a judge is a few KiB, and what is larger is another file
_LONGEST = 1 << 20


def read_rubric(path: str) -> str:
    """The file's text. Raises ConfigError if it cannot be read, lacks a placeholder, or is no question: no file, too large."""
    place = Path(path).expanduser()
    if place.exists() and not place.is_file():
        raise ConfigError(f"rubric {path} is no file: a rubric is a text file, read anew by every command")
    try:
        if (size := place.stat().st_size) > _LONGEST:
            raise ConfigError(
                f"rubric {path} holds {size:,} bytes: a judge's question is a text of at most {_LONGEST:,}"
            )
        text = place.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"rubric {path} cannot be read as UTF-8 text: {first_line(error)}") from None
    missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in text]
    if missing:
        raise ConfigError(
            f"rubric {path} lacks {', '.join(missing)}: write each where the judge is to see that text, as in "
            f"{' '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
        )
    return text
