"""`refscore view`: look at runs in a browser, vote on responses, or write the pages as a folder."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from pipeline.artifacts.runs import Run, open_run
from pipeline.artifacts.states import runs_here
from pipeline.errors import ConfigError, RefscoreError
from pipeline.evaluation.votes import Votes
from pipeline.view.answers import addresses
from pipeline.view.bundle import write_bundle
from stages import console


def main(run: str | None, port: int, vote: str | None, seed: int, bundle: Path | None) -> None:
    """Serve until interrupted, or write the folder `bundle` and end."""
    runs = _runs(run)
    if bundle is not None:
        if vote is not None:
            raise ConfigError("--bundle writes pages that take no votes: leave --vote out, or --bundle")
        _bundle(runs, bundle)
    else:
        _serve(_fragment(runs, run, vote, seed), port)


def _runs(name: str | None) -> list[Run]:
    runs = runs_here()
    if name is None:
        return runs
    run = open_run(name)
    if run not in runs:
        here = ", ".join(run.name for run in runs) or "none"
        raise ConfigError(f"run {name!r} is not here; there are: {here}")
    return [run]


def _fragment(runs: list[Run], run: str | None, vote: str | None, seed: int) -> str:
    """Where the page begins."""
    if vote is None:
        return f"#/runs/{quote(run)}" if run else "#/runs"
    if run is None:
        raise ConfigError("--vote needs --run: whose responses are voted on?")
    if not runs[0].samples.is_file():
        raise ConfigError(f"run {run!r} has no samples to vote on: run 'refscore eval' first")
    # refuses a name that cannot be a voter's
    Votes(runs[0], vote)
    return f"#/runs/{quote(run)}/vote?voter={quote(vote)}&seed={seed}"


def _serve(fragment: str, port: int) -> None:
    import uvicorn

    from pipeline.view.server import HOST, application

    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise RefscoreError(
            f"port {port} cannot be taken ({error.strerror}): name another with --port, or 0 for any"
        ) from None
    with listening:
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        console.say(f"open      http://{HOST}:{port}/?token={token}{fragment}")
        console.say("for this machine's own browser, until Ctrl-C; from another one: ssh -L, see docs/view.md")
        config = uvicorn.Config(
            application(token, port),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        # Ctrl-C is how this ends
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _bundle(runs: list[Run], to: Path) -> None:
    if not runs:
        raise ConfigError("there are no runs here to write pages of: 'refscore precompute' begins one")
    count = sum(1 for _ in addresses([run.name for run in runs]))
    with console.progress("writing pages", count) as ticker:
        files, written, problems = write_bundle(runs, to, ticker)
    for problem in problems:
        console.say(f"left out  {problem}")
    console.say(f"pages     {to}: {files} files, {written / 1e6:.1f} MB, of {', '.join(run.name for run in runs)}")
    console.say(f"any web server shows them: python -m http.server --directory {to}")
