"""Options that several commands have: what they are called, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run_names() -> list[str]:
    """Names of the runs here, for a shell that completes them."""
    from pipeline.artifacts.runs import existing_runs

    return existing_runs()


ConfigOption = Annotated[
    Path, typer.Option("--config", help="YAML file of the experiment, or a preset's name.", show_default=True)
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", help="Name of the run; default: the configuration's file name.", autocompletion=run_names),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="Override, e.g. train.beta=0.05; repeatable, or several in one text."
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON value on standard output; what is said goes to the error stream.")
]
DEMO = Path("demo")
RunsArgument = Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs.", autocompletion=run_names)]
