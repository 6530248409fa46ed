"""What every command has in common: --quiet and --verbose, and help that shows whole sentences in eighty columns."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.errors import ConfigError
from stages import console


class Commands(TyperGroup):
    """A group of commands, each of which takes --quiet and --verbose too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.commands.values():
            if not isinstance(command, Commands):
                command.params += _common()

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  # Typer's names
        """Every command with its whole sentence; Typer's own would end it where the line does."""
        rows = [(name, " ".join((command.help or "").split())) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _common() -> list[Any]:
    app = typer.Typer(add_completion=False)
    app.command()(_declared)
    return list(typer.main.get_command(app).params)


def _be_quiet(value: bool) -> None:
    if value:
        _one_of_them()
        console.speak(quiet=True)


def _be_verbose(value: bool) -> None:
    if value:
        _one_of_them()
        console.speak(verbose=True)


def _one_of_them() -> None:
    if console.manner.quiet or console.manner.verbose:
        raise ConfigError("--quiet and --verbose exclude each other: give one of them")


def _declared(
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_be_quiet,
            expose_value=False,
            help="No progress: only results, warnings and errors.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_be_verbose, expose_value=False, help="Also what libraries say of their work."
        ),
    ] = False,
) -> None:
    """What `_common` takes the options from."""
