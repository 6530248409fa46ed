"""What can go wrong that a user can mend, each with the exit code of the command that meets it.

A message says what is wrong, the value seen and the way out. Anything else that escapes is a bug.
"""

from __future__ import annotations


class RefscoreError(Exception):
    """Something stopped the command; the message stands by itself."""

    exit_code = 1


class ConfigError(RefscoreError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(RefscoreError):
    """Preference data or an artifact cannot be used."""

    exit_code = 3


class CheckError(RefscoreError):
    """A check of numbers failed: the gate, a verification, a score that cannot be true."""

    exit_code = 4


class OtherGone(RefscoreError):
    """Another process of the training ended before this one; what ended it says why."""

    def __init__(self) -> None:
        super().__init__("another process of this training has ended, which says why itself, or was killed")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, cut at 200 characters; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
