"""How a command ends: every failure and every interruption becomes a message and an exit code, also of the stages below."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.artifacts import durable
from pipeline.errors import OtherGone, RefscoreError, first_line
from stages import console, libraries

if TYPE_CHECKING:
    from pipeline.artifacts.runs import Run

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# set where a process above says how an interruption goes on
LAUNCHED = "REFSCORE_LAUNCHED"
# Ctrl-C reaches a stage from the terminal and, in `sweep`, from the process above it: both are one
_ONE_WISH_SECONDS = 1.0
# what may be wrong with a file or its disk, and is no bug
_OF_FILES = {
    *durable.FULL,
    *durable.REFUSED,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.EBUSY,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTEMPTY,
}
_received: list[tuple[float, str]] = []


class Interrupted(RefscoreError):
    """A user or a scheduler stopped the command; the message says how it goes on."""


def run(app: Callable[..., object]) -> int:
    """Run a Typer application; its exit code."""
    console.open_closed_streams()
    libraries.quiet()
    libraries.keep_caches_here()
    console.speak()
    stdout = sys.stdout
    with _signals_interrupt():
        try:
            app(prog_name="refscore")
        except SystemExit as stop:
            if stop.code == 130:  # as Typer ends after an interruption that nothing below explained
                if LAUNCHED not in os.environ:
                    console.fail(_how_stopped())
                return 1
            # Typer changes the stream if its reader went away (refscore --help | head)
            return 0 if sys.stdout is not stdout else _code(stop)
        except KeyboardInterrupt:
            # it came where nothing below could explain it
            if LAUNCHED not in os.environ:
                console.fail(_how_stopped())
            return 1
        except RefscoreError as error:
            # one of many processes may have nothing to say, as another one does
            if str(error) and not (LAUNCHED in os.environ and _is_said_above(error)):
                console.fail(str(error))
            return error.exit_code
        except console.OutputLost as lost:
            return _without_output(lost)
        except Exception as error:
            if os.environ.get("REFSCORE_DEBUG"):
                raise
            if _received:
                if LAUNCHED not in os.environ:
                    console.fail(_how_stopped())
            elif (message := _explained(error)) is not None:
                console.fail(message)
            else:
                console.report_bug(error)
            return 1
    return 0


def finish(code: int) -> None:
    """End the process, after what is still to be written of its output is."""
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _without_output(console.OutputLost(error))
    sys.exit(code)


@contextmanager
def working_on(run: Run, how: Callable[[Run], str]) -> Iterator[None]:
    """Write the run alone within the block, and keep its log. `how` says where the same command goes on."""
    from pipeline.artifacts.writer import writing

    with writing(run, _command()), _leaving_no_log_alone(run), noting(run), interruptible(lambda: how(run)):
        yield


def noting(run: Run) -> AbstractContextManager[None]:
    """Keep what is said within the block in the run's log, if the run is there."""
    return console.keeping_log(run.log, _command())


def _command() -> str:
    return f"refscore {shlex.join(sys.argv[1:])}"


@contextmanager
def interruptible(how: Callable[[], str]) -> Iterator[None]:
    """Let an interruption within the block say how the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{_how_stopped()}; {how()}") from None
    except console.OutputLost as lost:
        what = "nobody reads the output any more" if lost.gone else f"the output cannot be written ({lost})"
        raise Interrupted(f"stopped, as {what}; {how()}") from None
    except RefscoreError:
        raise
    except Exception as error:
        # a library may make another error of the interruption that it meets
        if _received:
            raise Interrupted(f"{_how_stopped()}; {how()}") from error
        raise


def from_the_store(_: Run | None = None) -> str:
    """Where scoring goes on."""
    return "what was scored is in the store, and the same command goes on from there"


def from_what_was_imported() -> str:
    """Where an import goes on."""
    return "what was imported is in the store, and the same command imports the rest"


def from_the_beginning() -> str:
    """Where it goes on if nothing is kept."""
    return "nothing of it was kept, and the same command begins again"


def from_a_checkpoint(run: Run) -> str:
    """Where stage two goes on."""
    command = "the same command without --restart" if "--restart" in sys.argv else "the same command"
    steps = [int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_*")]
    return f"{command} goes on from step {max(steps)}" if steps else "no checkpoint was written yet: it begins again"


def from_what_was_made(_: Run) -> str:
    """Where sampling and judging go on."""
    return "samples and verdicts that were written are used again: the same command goes on from there"


def from_the_last_stage() -> str:
    """Where several stages in a row go on."""
    return "what was finished is not done again: the same command goes on from there"


def _is_said_above(error: RefscoreError) -> bool:
    return isinstance(error, Interrupted | OtherGone)


def _code(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _without_output(lost: console.OutputLost) -> int:
    """The exit code of a command whose output could not be written. That a reader had enough is no failure."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if lost.gone:
        return 0
    console.fail(f"the output cannot be written ({lost}): send it elsewhere")
    return 1


def _explained(error: Exception) -> str | None:
    """What is wrong with a file, a disk or memory, in words; None for what nobody foresaw."""
    number = durable.error_number(error)
    if number in _OF_FILES:
        where = getattr(error, "filename", None)
        said = f"{where}: {os.strerror(number)}" if where else first_line(error)
        if number in durable.FULL:
            return f"no space left ({said}): free some, or choose another place, and run the same command again"
        return f"a file or directory cannot be used ({said}): mend it or its rights, or choose another place"
    from pipeline.engines.single import ran_out_of_memory

    if ran_out_of_memory(error):
        return (
            f"the memory does not suffice ({first_line(error)}): 'refscore plan' says what is needed and what to set for less; "
            "train.tokens_per_batch, data.max_length and policy.lora are what counts"
        )
    return None


def how_stopped(name: str) -> str:
    """What a signal did to a command."""
    return "interrupted" if name == "SIGINT" else f"stopped by {name}"


def _how_stopped() -> str:
    return how_stopped(_received[-1][1] if _received else "SIGINT")


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """What ends a process by default interrupts it instead, as Ctrl-C does: so it cleans up, and says how it goes on."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number in _SIGNALS:
        # who starts this with nohup wants it to be ignored
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, _: FrameType | None) -> None:
    again = bool(_received) and time.monotonic() - _received[-1][0] < _ONE_WISH_SECONDS
    if not again:
        _received.append((time.monotonic(), signal.Signals(number).name))
        raise KeyboardInterrupt


@contextmanager
def _leaving_no_log_alone(run: Run) -> Iterator[None]:
    """A command that fails before it writes anything leaves no run behind that is a log and nothing else."""
    fresh = not run.log.exists()
    try:
        yield
    except Interrupted:
        raise
    except RefscoreError:
        if fresh and {path.name for path in run.directory.iterdir()} <= {run.log.name, ".writer"}:
            run.log.unlink(missing_ok=True)
        raise
