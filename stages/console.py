"""What a stage shows: lines, tables, warnings, one progress bar. Plain lines if there is no terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError
from pipeline.progress import duration

# files and pipes have no width: wide enough that no table is folded
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
out = Console(highlight=False, soft_wrap=True, width=_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True, width=_WIDTH)

# between two lines of progress, in the first minute and after it: what lasts for hours does not fill a log
_EVERY_SECONDS, _LATER_SECONDS = 10.0, 60.0


def say(text: str) -> None:
    """One line of ordinary output; `text` is shown as it is."""
    out.print(escape(text))


def fail(text: str) -> None:
    """One error on the error stream."""
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
    out.print(shown)


def show_warnings() -> None:
    """Send the library's log records to the error stream; other packages' only from warnings on."""
    handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for name in ("pipeline", "stages"):
        logging.getLogger(name).setLevel(logging.INFO)
    # it warns on import of a kernel that is optional
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class Ticker:
    """Progress of one task: `advance` by units done, with a text that says what they were."""

    def __init__(self, title: str, total: int, bar: Progress | None) -> None:
        self._title, self._total, self._bar = title, total, bar
        self._task = bar.add_task(title, total=total, text="") if bar else None
        self._done, self._tokens, self._spoke = 0, 0, 0.0
        self.started = time.monotonic()

    def advance(self, units: int, text: str) -> None:
        """`units` more are done; `text` describes the state."""
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=units, text=escape(text))
            return
        now = time.monotonic()
        every = _EVERY_SECONDS if now - self.started < _LATER_SECONDS else _LATER_SECONDS
        if self._done >= self._total or now - self._spoke >= every:
            self._spoke = now
            left = (now - self.started) / max(1, self._done) * (self._total - self._done)
            say(f"{self._title} {self._done}/{self._total}  {text}  {duration(left)} left")

    def advance_tokens(self, units: int, tokens: int) -> None:
        """`units` more are done, of `tokens` tokens together."""
        self._tokens += tokens
        self.advance(units, f"{self._tokens / (time.monotonic() - self.started):.0f} tokens/s")


@contextmanager
def progress(title: str, total: int) -> Iterator[Ticker]:
    """A progress bar on a terminal; elsewhere a line every ten seconds, after a minute one per minute."""
    if not out.is_terminal:
        yield Ticker(title, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=out) as bar:
        yield Ticker(title, total, bar)


def quiet_libraries() -> None:
    """Set what libraries read from the environment when they are imported."""
    # read when the libraries are imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(Path("data/cache/matplotlib").absolute()))
