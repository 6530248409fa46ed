"""What a stage shows: lines, tables, warnings, one progress bar. Plain lines if there is no terminal.

Every line also goes to the log file of the run that is worked on, if there is one. `quiet` leaves out what is said while work
goes on; with `json_alone` standard output is kept for one JSON value, and everything else goes to the error stream.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError, first_line
from pipeline.progress import Listener, duration


class OutputLost(Exception):
    """Standard output cannot be written: its reader went away (`gone`), or its disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or first_line(error))
        self.gone = error.errno == errno.EPIPE


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise OutputLost(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


@dataclass
class Manner:
    """How this process speaks."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log: TextIO | None = None


manner = Manner()

# files and pipes have no width: wide enough that no table is folded. A stream that is closed is None
_WIDTH = None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else 140
out = _Console(highlight=False, soft_wrap=True, width=_WIDTH)
err = _Console(stderr=True, highlight=False, soft_wrap=True, width=_WIDTH)

# between two lines of progress, in the first minute and after it: what lasts for hours does not fill a log
_EVERY_SECONDS, _LATER_SECONDS = 10.0, 60.0


def speak(*, quiet: bool = False, verbose: bool = False, json_alone: bool = False) -> None:
    """Set how this process speaks, from here on."""
    manner.quiet, manner.verbose, manner.json = quiet, verbose, json_alone
    if verbose:
        # read by the libraries when they are imported
        os.environ.update(TRANSFORMERS_VERBOSITY="info", TORCH_CPP_LOG_LEVEL="WARNING", VLLM_LOGGING_LEVEL="INFO")
    show_warnings()


def as_asked() -> list[str]:
    """Options that make another process speak as this one does."""
    return ["--quiet"] if manner.quiet else ["--verbose"] if manner.verbose else []


def say(text: str) -> None:
    """One line of ordinary output; `text` is shown as it is."""
    _show(escape(text))
    _write_down(text)


def fail(text: str) -> None:
    """One error on the error stream."""
    _write_down(f"error: {text}")
    with suppress(OutputLost, OSError):
        err.print(f"[bold red]error:[/] {escape(text)}")


def report_bug(error: Exception) -> None:
    """An error that nobody foresaw: one line, and the traceback in a file. To be called while it is handled."""
    path = Path("data/cache/last-error.txt")
    try:
        durable.write_text(path, traceback.format_exc())
        advice = f"details are in {path}; please report them"
    except (RefscoreError, OSError):
        advice = "run again with REFSCORE_DEBUG=1 for details"
    fail(f"unexpected {type(error).__name__}: {str(error).strip() or 'no message'} - a bug in refscore: {advice}")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small table; every column after the first is aligned right."""
    shown = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2)
    )
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    _show(shown)
    if manner.log is not None:
        for line in _plain(shown).splitlines():
            _write_down(line)


def answer_alone(asked: bool) -> None:  # noqa: FBT001
    """Keep standard output for one JSON value, if `asked`; what is said goes to the error stream."""
    manner.json = asked


def answer(value: Any) -> None:
    """The JSON value that standard output is kept for; nothing if it is not."""
    if not manner.json:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        raise OutputLost(error) from None


def show_warnings() -> None:
    """Send log records to the error stream and to the run's log: the library's, and other packages' from warnings on.

    Verbose: all of both; quiet: warnings alone.
    """
    level = logging.INFO if manner.verbose else logging.WARNING
    handlers = [_ToErrorStream(), _ToLog()]
    once = _Once()
    for handler in handlers:
        handler.addFilter(once)
    logging.basicConfig(level=level, format="%(message)s", handlers=handlers, force=True)
    own = logging.DEBUG if manner.verbose else logging.WARNING if manner.quiet else logging.INFO
    # as these packages are called here: the wheel has them below another one
    for name in (durable.__name__.removesuffix(".artifacts.durable"), __name__.removesuffix(".console")):
        logging.getLogger(name).setLevel(own)
    # it warns on import of a kernel that is optional
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def keeping_log(path: Path, command: str) -> Iterator[None]:
    """Append `command` and every line that is said to `path` within the block, each with the time, as soon as it is said.

    A log that cannot be written is left: what matters is what is logged.
    """
    with suppress(OSError):
        # line by line: a process that is killed has written what it said
        manner.log = path.open("a", encoding="utf-8", buffering=1, errors="backslashreplace")
    _write_down(f"$ {command}")
    started = time.monotonic()
    try:
        yield
    except BaseException as error:
        _write_down(f"ended after {duration(time.monotonic() - started)}: {first_line(error)}")
        raise
    else:
        _write_down(f"done in {duration(time.monotonic() - started)}")
    finally:
        log, manner.log = manner.log, None
        if log is not None:
            with suppress(OSError):
                log.close()


class Ticker:
    """Progress of one task: `advance` by units done, with a text that says what they were."""

    def __init__(self, title: str, total: int, bar: Progress | None, done: int = 0) -> None:
        self._title, self._total, self._about, self._bar = title, total, "", bar
        self._task = bar.add_task(title, total=total, completed=done, about="", text="") if bar else None
        self._before, self._done, self._tokens, self._spoke = done, done, 0, 0.0
        self.started = time.monotonic()

    def advance(self, units: int, text: str) -> None:
        """`units` more are done; `text` describes the state."""
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, text=escape(text))
        now = time.monotonic()
        every = _EVERY_SECONDS if now - self.started < _LATER_SECONDS else _LATER_SECONDS
        if self._done >= self._total or now - self._spoke >= every:
            self._spoke = now
            left = (now - self.started) / max(1, self._done - self._before) * (self._total - self._done)
            line = f"{self._title} {self._done}/{self._about}{self._total}  {text}  {duration(left)} left"
            _write_down(line)
            if self._bar is None and not manner.quiet:
                _show(escape(line))

    def advance_tokens(self, units: int, tokens: int) -> None:
        """`units` more are done, of `tokens` tokens together."""
        self._tokens += tokens
        self.advance(units, f"{self._tokens / (time.monotonic() - self.started):.0f} tokens/s")

    def expect(self, total: int, *, about: bool) -> None:
        """The task has `total` units, or `about` so many, as is known by now."""
        self._total, self._about = total, "about " if about else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total, about=self._about)


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Ticker]:
    """A progress bar on a terminal; elsewhere a line every ten seconds, after a minute one per minute.

    `done` of `total` units were done before, by a process that was interrupted.
    """
    if manner.quiet or not _stream().is_terminal:
        yield Ticker(title, total, None, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.fields[about]}{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=_stream()) as bar:
        yield Ticker(title, total, bar, done)


class _Working:
    """`pipeline.progress.Listener` of this process: silent if it is to be quiet, but for the run's log."""

    def say(self, text: str) -> None:
        if manner.quiet:
            _write_down(text)
        else:
            say(text)

    progress = staticmethod(progress)


working: Listener = _Working()


def open_closed_streams() -> None:
    """Give streams that were closed (`refscore ... >&-`) a place: else the next file to be opened would get their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class _Once(logging.Filter):
    """Lets a text pass once: engines that are started one after the other, and libraries, say the same again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], logging.LogRecord] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # the same record comes by once for each handler
        return self._said.setdefault((record.levelname, record.getMessage()), record) is record


class _ToErrorStream(logging.Handler):
    """Log records as lines; a stream that nobody reads is no reason to stop."""

    def emit(self, record: logging.LogRecord) -> None:
        colour = "yellow" if record.levelno < logging.ERROR else "red"
        with suppress(OutputLost, OSError):
            err.print(f"[{colour}]{record.levelname:8}[/] {escape(record.getMessage())}")


class _ToLog(logging.Handler):
    """Warnings, and what the library says of its work, in the run's log."""

    def emit(self, record: logging.LogRecord) -> None:
        _write_down(f"{record.levelname.lower()}: {record.getMessage()}")


def _stream() -> Console:
    return err if manner.json else out


def _show(what: Any) -> None:
    try:
        _stream().print(what)
    except OSError as error:
        raise OutputLost(error) from None


def _write_down(text: str) -> None:
    if manner.log is None:
        return
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with suppress(OSError, ValueError):
        manner.log.write("".join(f"{now}  {line}\n" for line in text.splitlines() or [""]))


def _plain(shown: Table) -> str:
    page = Console(width=200, highlight=False, color_system=None)
    with page.capture() as kept:
        page.print(shown)
    return "\n".join(line.rstrip() for line in kept.get().splitlines())
