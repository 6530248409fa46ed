"""`refscore export`: a run's responses and judgements in the files of AlpacaEval or Arena-Hard."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts.runs import Run
from pipeline.artifacts.tables import JUDGEMENTS, SAMPLES, read_table
from pipeline.errors import ConfigError
from pipeline.evaluation.samples import comparisons_of, held_out_prompts
from pipeline.judges.judging import Judgement
from pipeline.report.exchange import write_alpaca_eval, write_arena_hard
from stages import console

FORMATS = {"alpaca_eval": write_alpaca_eval, "arena_hard": write_arena_hard}


def main(run: Run, format_name: str, to: Path | None) -> None:
    """Write the files below `to` (default: export/<format> in the run)."""
    if format_name not in FORMATS:
        raise ConfigError(f"--format {format_name!r} is unknown; there are: {', '.join(FORMATS)}")
    samples = read_table(run.samples, SAMPLES)
    models = list(dict.fromkeys(samples["model"].to_pylist()))
    comparisons = comparisons_of(samples, held_out_prompts(run.pairs, None), models)
    judgements = [Judgement(**row) for row in read_table(run.judgements, JUDGEMENTS).to_pylist()]
    for path in FORMATS[format_name](to or run.directory / "export" / format_name, comparisons, judgements):
        console.say(str(path))
