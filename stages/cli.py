"""The command line. Parses, then imports the stage that is asked for: `--help` loads neither torch nor vLLM."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import RefscoreError
from stages import console

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.runs import Run

app = typer.Typer(
    name="refscore",
    help="Score a DPO reference model once, train the policy alone against the stored scores, judge the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file of the experiment.", show_default=True)]
RunOption = Annotated[str | None, typer.Option("--run", help="Name of the run; default: the configuration's file name.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. train.beta=0.05; repeatable.")]
DEMO = Path("pipeline/presets/demo.yaml")


@app.command()
def precompute(
    config: ConfigOption = DEMO,
    run: RunOption = None,
    set_: SetOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be scored; loads no model.")] = False,
) -> None:
    """Stage 1: score chosen and rejected under the reference model; writes pairs.parquet."""
    resolved, opened = _open(config, run, set_)
    from stages import precompute as stage

    stage.run(resolved, opened, plan_only=plan)


@app.command()
def doctor() -> None:
    """What this machine has, and what is missing, with the fix."""
    from stages import doctor as stage

    stage.run()


def main() -> None:
    """Entry point: run a command, turn every failure into a message and an exit code."""
    _quiet_libraries()
    console.show_warnings()
    try:
        app(prog_name="refscore")
    except RefscoreError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.fail("interrupted")
        sys.exit(1)
    except BrokenPipeError:
        # the reader of our output went away (refscore show ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if os.environ.get("REFSCORE_DEBUG"):
            raise
        _report_bug(error)
        sys.exit(1)


def _open(config: Path, run: str | None, overrides: list[str] | None) -> tuple[Config, Run]:
    from pipeline.config import load_config
    from pipeline.runs import open_run

    return load_config(config, overrides or []), open_run(run if run is not None else config.stem)


def _quiet_libraries() -> None:
    # read when the libraries are imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(Path("data/cache/matplotlib").absolute()))


def _report_bug(error: Exception) -> None:
    from pipeline import durable

    path = Path("data/cache/last-error.txt")
    try:
        durable.write_text(path, traceback.format_exc())
        where = f"details are in {path}; please report them"
    except (RefscoreError, OSError):
        where = "run again with REFSCORE_DEBUG=1 for details"
    console.fail(f"unexpected {type(error).__name__}: {str(error).strip() or 'no message'} - a bug in refscore: {where}")


if __name__ == "__main__":
    main()
