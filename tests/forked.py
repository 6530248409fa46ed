"""Commands in processes of their own that need not import PyTorch first: a server imports it once, and forks each of them.

They are processes like any other, with signals, an end, files and an environment of their own. Where a test is about how an
interpreter begins or ends, or what an import reads from the environment, it starts one by `subprocess`.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
COMMAND = "from stages.cli import main\nmain()\n"
# as `python -m`: the module's name is the first argument
MODULE = "import runpy, sys\nrunpy.run_module(sys.argv.pop(1), run_name='__main__')\n"
_CONTEXT = multiprocessing.get_context("forkserver")
# libraries and what only imports them: not `stages`, which sets up the console and the environment
_CONTEXT.set_forkserver_preload(
    ["pipeline.training.train", "pipeline.engines.transformers", "transformers.models.llama.modeling_llama"]
)


class Forked:
    """A process that runs `code` with `arguments` in `where`, as `python -c` would; used like `subprocess.Popen`."""

    def __init__(self, where: Path, code: str, *arguments: object, **environment: str) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._said = TemporaryDirectory()
        self._process = _CONTEXT.Process(
            target=_run,
            args=(
                code,
                [*map(str, arguments)],
                str(where),
                {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", **environment},
                os.sched_getaffinity(0),
                self._said.name,
            ),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The negative number of a signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it said on stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        said = [Path(self._said.name, name) for name in ("1", "2")]
        return tuple(file.read_text(encoding="utf-8") if file.exists() else "" for file in said)


def run(where: Path, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` to its end."""
    process = Forked(where, code, *arguments, **environment)
    said = process.communicate(300)
    return subprocess.CompletedProcess([code, *arguments], process.returncode, *said)


def refscore(where: Path, *arguments: object, code: int = 0, **environment: str) -> str:
    """Run the command line in `where`; returns stdout, then stderr. The exit code must be `code`."""
    done = run(where, COMMAND, *arguments, **environment)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def _run(
    code: str, arguments: list[str], where: str, environment: Mapping[str, str], processors: set[int], said: str
) -> None:
    os.sched_setaffinity(0, processors)
    os.chdir(where)
    os.environ.clear()
    os.environ.update(environment)
    streams = []
    for number in (1, 2):
        file = os.open(f"{said}/{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
        streams.append(io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), "utf-8", line_buffering=number == 2))
    sys.stdout, sys.stderr = streams
    sys.argv = ["-c", *arguments]
    # as from a terminal: the tests may have been started with nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
    finally:
        # which processes of `multiprocessing` leave out
        atexit._run_exitfuncs()
