"""The commands that are about runs which are there already; what they do stands in a file per command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages import console, ending
from stages.options import JsonOption, RunsArgument, run_names

# without a name of its own, so that they stand beside the stages
run_commands = typer.Typer(rich_markup_mode=None)


@run_commands.command(name="list")
def list_(json: JsonOption = False) -> None:
    """The runs that are here: how far each has come, whether it runs now, its size and key figures."""
    console.answer_alone(json)
    from stages import list as stage

    stage.main()


@run_commands.command()
def rm(
    runs: RunsArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete runs, after asking; their scores stay in the store. A run that is being written is refused."""
    from stages import rm as stage

    stage.main(runs, yes=yes)


@run_commands.command()
def prune(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN...]", help="Names of runs; default: all.", autocompletion=run_names),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it.")] = False,
) -> None:
    """Checkpoints of finished runs, and what killed writers left behind; changes nothing without --apply."""
    from stages import prune as stage

    stage.main(runs or [], apply=apply)


@run_commands.command()
def show(path: Annotated[Path, typer.Argument(help="A run, a store, or any file in them.")]) -> None:
    """Any artifact, readable: schema, rows, summary."""
    from stages import show as stage

    stage.main(path)


@run_commands.command()
def compare(
    runs: RunsArgument,
    page: Annotated[
        Path | None, typer.Option("--page", help="Where the page goes; default: data/runs/compare.html.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Experiments side by side: settings that differ, figures, paired differences, and the frontier as a page."""
    console.answer_alone(json)
    from pipeline.artifacts.runs import open_run
    from stages import compare as stage

    stage.main([open_run(name) for name in runs], page)


@run_commands.command()
def export(
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    format_: Annotated[
        str,
        typer.Option("--format", help="trl, open_instruct, fairseq2, jsonl: pairs; alpaca_eval, arena_hard: samples."),
    ] = "trl",
    to: Annotated[Path | None, typer.Option("--to", help="Directory; default: export/<format> in the run.")] = None,
) -> None:
    """Scored pairs in the files of other trainers, or samples and judgements in those of other judges."""
    from pipeline.artifacts.runs import open_run
    from stages import export as stage

    stage.main(open_run(run), format_, to)


@run_commands.command()
def push(
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="Repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
) -> None:
    """The trained model, with its card, to the Hugging Face Hub."""
    from pipeline.artifacts.runs import open_run
    from stages import push as stage

    stage.main(open_run(run), to, private=private)


@run_commands.command()
def repeat(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run to repeat.")],
    run: Annotated[str | None, typer.Option("--run", help="Name of the new run; default: RUN-again.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what differs now; run nothing.")] = False,
) -> None:
    """A run's stages again from the same inputs by digest, and how far the outcome is the same."""
    from pipeline.artifacts.runs import open_run
    from stages import repeat as stage

    to_repeat = open_run(name)
    again = open_run(run if run is not None else f"{name}-again")
    with ending.interruptible(ending.from_the_last_stage):
        stage.main(to_repeat, again, check_only=check)


@run_commands.command()
def judges(
    run: Annotated[str | None, typer.Option("--run", help="Name of the run whose judges are meant.")] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="Instead of a run: a file of AlpacaEval or Arena-Hard.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="What people or another judge said: a file of the same kinds.")
    ] = None,
) -> None:
    """How far judges agree, with each other or with people, beyond chance; what they lean to and what they cost."""
    from pipeline.artifacts.runs import open_run
    from stages import judges as stage

    stage.main(open_run(run) if run is not None else None, annotations, against)


@run_commands.command()
def view(
    run: Annotated[
        str | None, typer.Option("--run", help="Begin at this run; default: the list of all.", autocompletion=run_names)
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0: any.")] = 7788,
    vote: Annotated[
        str | None, typer.Option("--vote", metavar="NAME", help="Vote blind on --run's responses under this name.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Order of the ballots, and which response stands first.")
    ] = 0,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", help="Serve nothing: write the pages as a folder.")
    ] = None,
) -> None:
    """Look at runs, samples, verdicts, pairs and curves in a browser, or vote on responses without seeing who wrote them."""
    from stages import view as stage

    stage.main(run, port, vote, seed, bundle)
