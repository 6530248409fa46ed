"""The command line. Parses, then imports the stage that is asked for: `--help` loads neither torch nor vLLM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.version import __version__
from stages import console, ending, manner
from stages.options import DEMO, ConfigOption, JsonOption, RunOption, SetOption
from stages.run_commands import run_commands
from stages.store_commands import store_app

if TYPE_CHECKING:
    from pipeline.artifacts.runs import Run
    from pipeline.config.experiment import Config


def _version(value: bool) -> None:
    if value:
        typer.echo(f"refscore {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="refscore",
    cls=manner.Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(run_commands)
app.add_typer(store_app, name="store")


@app.callback()
def refscore(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Score a DPO reference model once, train the policy alone against the stored scores, judge the result."""


@app.command()
def init(
    data: Annotated[list[str], typer.Argument(help="Preference data: files, folders or Hub data set ids.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Directory or Hub id; default: the model that comes with refscore.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: the data's name.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a configuration for data of your own: looks at data, model and memory, and says what it chose and why."""
    from stages import init as stage

    stage.main(data, model, out, force=force)


@app.command()
def precompute(
    config: ConfigOption = DEMO,
    run: RunOption = None,
    set_: SetOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be scored; loads no model.")] = False,
    plan_to: Annotated[
        str | None,
        typer.Option(
            "--plan-to", metavar="PLACE", help="Write what is missing to a directory or URL, for score-missing."
        ),
    ] = None,
) -> None:
    """Stage 1: score chosen and rejected under the reference model; writes pairs.parquet."""
    resolved, opened = _open(config, run, set_)
    # a plan writes nothing into the run
    alone = ending.interruptible if plan or plan_to else partial(ending.working_on, opened)
    with alone(ending.from_the_store):
        from stages import precompute as stage

        stage.main(resolved, opened, plan_only=plan, plan_to=plan_to)


@app.command(name="score-missing")
def score_missing(
    place: Annotated[str, typer.Argument(help="Directory or URL that 'refscore precompute --plan-to' wrote.")],
    config: ConfigOption = DEMO,
    set_: SetOption = None,
) -> None:
    """Score groups of a written plan into the store, beside other such processes; plans nothing."""
    from pipeline.config.files import load_config

    resolved = load_config(config, set_ or [])
    with ending.interruptible(ending.from_the_store):
        from stages import score_missing as stage

        stage.main(place, resolved)


@app.command()
def plan(
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the scoring, and train together.")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(min=0.1, help="GiB of one GPU: predict for it.")] = None,
    scoring_speed: Annotated[
        float | None, typer.Option(min=1, help="Tokens per second of stage 1 on one device.")
    ] = None,
    training_speed: Annotated[float | None, typer.Option(min=1, help="Tokens per second of stage 2.")] = None,
    json: JsonOption = False,
) -> None:
    """What an experiment will take: memory, steps, tokens, time, and what to set if it does not fit."""
    console.answer_alone(json)
    from pipeline.config.files import load_config
    from stages import plan as stage

    stage.main(load_config(config, set_ or []), devices, gpu_memory, scoring_speed, training_speed)


@app.command()
def train(
    config: ConfigOption = DEMO,
    run: RunOption = None,
    set_: SetOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an earlier training of this run away.")] = False,
    devices: Annotated[
        int, typer.Option("--devices", min=1, help="GPUs, or shares of the processors, that train together.")
    ] = 1,
) -> None:
    """Stage 2: train the policy alone against pairs.parquet; resumes an interrupted training."""
    from stages import devices as many

    resolved, opened = _open(config, run, set_)
    if devices > 1 and not many.inside():
        options = [part for override in set_ or [] for part in ("--set", override)]
        again = ["--restart"] if restart else []
        command = ["train", "--config", str(config), "--run", opened.name, *options, *again, *console.as_asked()]
        with ending.interruptible(lambda: ending.from_a_checkpoint(opened)):
            many.launch(devices, command, lambda: ending.from_a_checkpoint(opened))
        return
    with many.writing_alone(opened):
        from stages import train as stage

        stage.main(resolved, opened, restart=restart)


@app.command()
def rollout(config: ConfigOption = DEMO, run: RunOption = None, set_: SetOption = None) -> None:
    """Samples of the policy for its training prompts, with rewards and scores, for train.objective=policy_gradient."""
    resolved, opened = _open(config, run, set_)
    with ending.working_on(opened, ending.from_what_was_made):
        from stages import rollout as stage

        stage.main(resolved, opened)


@app.command(name="eval")
def evaluate(
    config: ConfigOption = DEMO, run: RunOption = None, set_: SetOption = None, json: JsonOption = False
) -> None:
    """Stage 3: generate with policy and reference on held-out prompts, judge, report."""
    console.answer_alone(json)
    resolved, opened = _open(config, run, set_)
    with ending.working_on(opened, ending.from_what_was_made):
        from stages import eval as stage

        stage.main(resolved, opened)


@app.command(name="config")
def config_(
    field: Annotated[
        str | None, typer.Argument(help="A field or a section, e.g. train.beta; default: all fields.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON schema of configuration files.")] = False,
) -> None:
    """The fields of a configuration: meaning, default and limits; or a JSON schema for editors."""
    from stages import config as stage

    stage.main(field, as_schema=schema)


@app.command()
def validate(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Preference data: files, patterns in quotes, folders, Hub data set ids, or - for standard input."
        ),
    ],
    set_: SetOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Tokenise as for this model too: lengths, boundaries, truncation.")
    ] = None,
) -> None:
    """Format, counts and every problem of preference data, with its row; loads no model."""
    from stages import validate as stage

    stage.main(data, set_ or [], model)


@app.command()
def verify(
    run: Annotated[str, typer.Option("--run", help="Name of the run.")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Pairs to score again.")] = 20,
    engines: Annotated[
        str, typer.Option("--engines", help="Measure these too, e.g. vllm:float32,vllm:bfloat16,transformers:bfloat16.")
    ] = "",
) -> None:
    """Score a sample again with transformers in float32 and report the difference to the stored scores."""
    from pipeline.artifacts.runs import open_run
    from stages import verify as stage

    opened = open_run(run)
    with ending.noting(opened):
        stage.main(opened, rows, [name.strip() for name in engines.split(",") if name.strip()])


@app.command()
def score(
    data: Annotated[Path, typer.Argument(help="JSONL or Parquet with the columns prompt and response.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Beside them the K likeliest tokens per position, for distillation."),
    ] = None,
) -> None:
    """Score any responses under the reference, through the same store; writes their log-probabilities."""
    from pipeline.config.files import load_config

    resolved = load_config(config, set_ or [])
    # the likeliest tokens enter no store
    with ending.interruptible(ending.from_the_store if top_k is None else ending.from_the_beginning):
        from stages import score as stage

        stage.main(data, out, resolved, top_k)


@app.command()
def sweep(config: ConfigOption = DEMO, run: RunOption = None, set_: SetOption = None) -> None:
    """All stages for every point of a grid: --set train.beta=0.03,0.1,0.3; then the comparison."""
    from stages import compare as comparison
    from stages import sweep as stage

    with ending.interruptible(ending.from_the_last_stage):
        runs = stage.main(config, run if run is not None else config.stem, set_ or [])
    comparison.main(runs, None)


@app.command()
def pairs(config: ConfigOption = DEMO, run: RunOption = None, set_: SetOption = None) -> None:
    """New preference pairs: the run's policy answers its training prompts, a judge sets best against worst."""
    resolved, opened = _open(config, run, set_)
    with ending.working_on(opened, ending.from_what_was_made):
        from stages import pairs as stage

        stage.main(resolved, opened)


@app.command()
def iterate(
    config: ConfigOption = DEMO,
    run: RunOption = None,
    set_: SetOption = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of training.")] = 2,
) -> None:
    """Rounds of training, each from the last one's policy and on what it wrote: pairs or samples; then all are judged."""
    from pipeline.config.files import load_config
    from stages import iterate as stage

    resolved = load_config(config, set_ or [])
    with ending.interruptible(ending.from_the_last_stage):
        stage.main(resolved, config, run if run is not None else config.stem, set_ or [], rounds)


@app.command(name="import")
def import_(
    data: Annotated[Path, typer.Argument(help="File or directory in a form that refscore export writes.")],
    config: ConfigOption = DEMO,
    set_: SetOption = None,
    by: Annotated[
        str | None, typer.Option("--by", help="Who computed the scores; default: reference.imported_by.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="trl, jsonl, open_instruct, fairseq2; default: found out from the data."),
    ] = None,
) -> None:
    """Take scores that others computed into the store, as imported and unverified; used only if they are asked for."""
    from pipeline.config.files import load_config

    resolved = load_config(config, set_ or [])
    with ending.interruptible(ending.from_what_was_imported):
        from stages import import_scores as stage

        stage.main(data, resolved, str(config), by, format_)


@app.command()
def doctor() -> None:
    """What this machine has, and what is missing, with the fix."""
    from stages import doctor as stage

    stage.main()


def main() -> None:
    """Entry point: run a command, turn every failure into a message and an exit code."""
    ending.finish(ending.run(app))


def _open(config: Path, run: str | None, overrides: list[str] | None) -> tuple[Config, Run]:
    from pipeline.artifacts.runs import open_run
    from pipeline.config.files import load_config
    from pipeline.errors import ConfigError

    resolved = load_config(config, overrides or [])
    try:
        return resolved, open_run(run if run is not None else config.stem)
    except ConfigError as error:
        raise error if run is not None else ConfigError(f"{error}; this is that of {config}: give --run NAME") from None


if __name__ == "__main__":
    main()
