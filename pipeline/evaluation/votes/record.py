"""What people voted: `votes/<voter>.jsonl` of a run, one line a vote, appended and on the disk before the next is asked for.

A line is an annotation in AlpacaEval's form (output_1 is the response that stood first; preference 1, 2, 1.5 for a tie, null
for a skip), so that `annotations:<file>` reads it; beside it stand who voted, when, and on which sample. A vote on the same
comparison replaces the one before: the last line counts. What a killed process left of a line is no vote.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.votes.order import Ballot
from pipeline.judges.judging import Compared

log = logging.getLogger(__name__)

Choice = Literal["first", "second", "tie", "skip"]
# as AlpacaEval writes what is preferred
_PREFERENCES: dict[Choice, float | None] = {"first": 1, "second": 2, "tie": 1.5, "skip": None}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# file systems without flock: a line that is appended in one write is whole there too
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Given:
    """One vote: the comparison, the texts in the order in which they stood, and what was said of them."""

    prompt_id: str
    sample: int
    model: str
    baseline: str
    prompt: str
    first: str
    second: str
    first_is_model: bool
    choice: Choice
    note: str = ""
    seconds: float | None = None
    time: str = ""

    @property
    def key(self) -> Compared:
        return self.prompt_id, self.sample, self.model, self.baseline

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.prompt, self.first, self.second

    @property
    def score(self) -> float | None:
        """1 if the first response was preferred, 0 the second, 0.5 a tie; None for a skip."""
        preference = _PREFERENCES[self.choice]
        return None if preference is None else 2.0 - preference


class Votes:
    """The votes of one person on one run. Safe for threads and processes that vote under one name at once.

    Raises ConfigError for a name that cannot be that of a file, DataError for a file whose lines are no votes.
    """

    def __init__(self, run: Run, voter: str) -> None:
        if not _NAME.fullmatch(voter):
            raise ConfigError(
                f"voter {voter[:80]!r}: up to 64 letters, digits, '.', '_' and '-' only, beginning with a letter or digit"
            )
        self.run, self.voter = run, voter
        self.path = run.votes / f"{voter}.jsonl"
        self._seen: tuple[object, list[Given]] | None = None

    def given(self) -> dict[Compared, Given]:
        """Every comparison that was voted on, skips among them, with its last vote; in the order of these."""
        last: dict[Compared, Given] = {}
        for vote in self.every():
            last.pop(vote.key, None)
            last[vote.key] = vote
        return last

    def every(self) -> list[Given]:
        """All votes but those that another one on the same responses replaced, in the order in which they were given.

        Other responses to the same prompt are another comparison: votes on those that are gone count again if they come back.
        """
        try:
            with self.path.open("rb") as file:
                _lock(file.fileno(), fcntl.LOCK_SH)
                status = os.fstat(file.fileno())
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                if self._seen is None or self._seen[0] != state:
                    self._seen = (state, _last_of_each(self._read(file.read())))
                return list(self._seen[1])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}): mend its rights, or move it away"
            ) from None

    def add(self, ballot: Ballot, choice: Choice, note: str = "", seconds: float | None = None) -> Given:
        """Write down one vote; when this returns, it is on the disk. Raises ConfigError for what cannot be one."""
        if choice not in _PREFERENCES:
            raise ConfigError(f"choice {choice!r} is unknown; there are: {', '.join(_PREFERENCES)}")
        if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"a vote that took {seconds!r} seconds: a number from 0 on, or nothing")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        shown = (ballot.prompt, ballot.first, ballot.second, ballot.first_is_model)
        vote = Given(*ballot.key, *shown, choice, note, seconds, now)
        line = self._line(vote)
        with self._writing() as descriptor:
            _append(descriptor, line)
        return vote

    def undo(self) -> Given | None:
        """Take the last vote back, so that one it had replaced counts again; None if there is none."""
        if not self.path.is_file():
            return None
        with self._writing() as descriptor:
            content = _content(descriptor)
            votes = self._read(content)
            if votes:
                os.ftruncate(descriptor, content.rstrip().rfind(b"\n") + 1)
                os.fsync(descriptor)
            return votes[-1] if votes else None

    def _line(self, vote: Given) -> bytes:
        generators = (vote.model, vote.baseline) if vote.first_is_model else (vote.baseline, vote.model)
        fields = {
            "instruction": vote.prompt,
            "output_1": vote.first,
            "generator_1": generators[0],
            "output_2": vote.second,
            "generator_2": generators[1],
            "dataset": "refscore",
            "annotator": self.voter,
            "preference": _PREFERENCES[vote.choice],
            "note": vote.note,
            "time": vote.time,
            "seconds": vote.seconds,
            "prompt_id": vote.prompt_id,
            "sample": vote.sample,
            "baseline": vote.baseline,
        }
        try:
            return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half a character cannot be written as UTF-8
            return json.dumps(fields).encode() + b"\n"

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """The file, locked, and ending with a whole line."""
        with durable.explaining_disk(self.path):
            descriptor = self._open()
            try:
                _lock(descriptor, fcntl.LOCK_EX)
                if not _is_named(descriptor, self.path):
                    raise DataError(f"{self.path} was removed while it was voted: vote again")
                self._mend(descriptor)
                yield descriptor
            finally:
                self._seen = None
                os.close(descriptor)

    def _open(self) -> int:
        try:
            made = not self.path.exists()
            self.path.parent.mkdir(exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            if made:
                durable.flush(self.path.parent)
                durable.flush(self.run.directory)
            return descriptor
        except FileNotFoundError:
            raise DataError(f"{self.run.directory} is gone: there is nothing to vote on") from None
        except OSError as error:
            if error.errno in (*durable.FULL, *durable.REFUSED):
                raise
            raise DataError(f"{self.path} cannot be written ({error.strerror}): move away what is there") from None

    def _mend(self, descriptor: int) -> None:
        """Cut off what a killed process left of a line; a whole vote that only lacks its end gets it."""
        content = _content(descriptor)
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if _vote_in(content[whole:]):
            _append(descriptor, b"\n")
        else:
            log.info("%s: cut off %d bytes of a line that was not written whole", self.path, len(content) - whole)
            os.ftruncate(descriptor, whole)

    def _read(self, content: bytes) -> list[Given]:
        votes = []
        lines = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            vote = _vote_in(line)
            if vote is None and number == len(lines):
                continue  # torn: no newline ends it
            if vote is None:
                raise DataError(f"{self.path}, line {number}: not a vote: mend the line, or delete it")
            votes.append(vote)
        return votes


def voters(run: Run) -> list[str]:
    """Who voted on the run's samples, by name."""
    return sorted(path.stem for path in run.votes.glob("*.jsonl") if _NAME.fullmatch(path.stem))


def votes_here(run: Run) -> dict[str, list[Given]]:
    """The votes of every voter, without those that were replaced. Raises DataError as `Votes` does."""
    return {voter: Votes(run, voter).every() for voter in voters(run)}


def _last_of_each(votes: Sequence[Given]) -> list[Given]:
    last: dict[tuple[Compared, str, frozenset[str]], Given] = {}
    for vote in votes:
        what = (vote.key, vote.prompt, frozenset((vote.first, vote.second)))
        last.pop(what, None)
        last[what] = vote
    return list(last.values())


def _vote_in(line: bytes) -> Given | None:
    """The vote that a line holds; None if it holds none."""
    try:
        row: dict[str, Any] = json.loads(line)
        texts = (row["instruction"], row["output_1"], row["output_2"])
        names = (row["generator_1"], row["generator_2"], row["baseline"], row["prompt_id"], row.get("note") or "")
        if not all(isinstance(text, str) for text in (*texts, *names)) or not isinstance(row["sample"], int):
            return None
        first_is_model = row["generator_1"] != row["baseline"]
        model = row["generator_1"] if first_is_model else row["generator_2"]
        choice = next(choice for choice, stands_for in _PREFERENCES.items() if stands_for == row["preference"])
        return Given(
            row["prompt_id"],
            row["sample"],
            model,
            row["baseline"],
            *texts,
            first_is_model,
            choice,
            row.get("note") or "",
            _number(row.get("seconds")),
            str(row.get("time", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError, OverflowError):
        return None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the file that was opened: `refscore rm` may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _append(descriptor: int, line: bytes) -> None:
    """Append the line and wait for the disk; if that fails, nothing of it stays."""
    before = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, before)
        raise
