"""`refscore export`: a run's scored pairs in the files of other trainers; its samples and judgements in those of other judges."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts.runs import Run, read_saved_config
from pipeline.artifacts.schemas import JUDGEMENTS, SAMPLES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.files import load_overrides
from pipeline.errors import ConfigError
from pipeline.evaluation.samples import comparisons_of, held_out_prompts
from pipeline.exchange.cards import must_take, remove_stale, write_card
from pipeline.exchange.judged_samples import write_alpaca_eval, write_arena_hard
from pipeline.exchange.scored_pairs import (
    write_fairseq2,
    write_jsonl,
    write_open_instruct,
    write_trl,
)
from pipeline.judges.judging import Judgement
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from stages import console

OF_PAIRS = {"trl": write_trl, "open_instruct": write_open_instruct, "jsonl": write_jsonl}
# beside the pairs it reads the tokenizer that made them
FAIRSEQ2 = "fairseq2"
OF_SAMPLES = {"alpaca_eval": write_alpaca_eval, "arena_hard": write_arena_hard}


def main(run: Run, format_name: str, to: Path | None) -> None:
    """Write the files below `to` (default: export/<format> in the run)."""
    directory = to or run.directory / "export" / format_name
    if format_name in [*OF_PAIRS, FAIRSEQ2]:
        _export_pairs(run, format_name, directory)
    elif format_name in OF_SAMPLES:
        _export_samples(run, format_name, directory)
    else:
        raise ConfigError(
            f"--format {format_name!r} is unknown; there are: {', '.join([*OF_PAIRS, FAIRSEQ2, *OF_SAMPLES])}"
        )


def _export_pairs(run: Run, format_name: str, directory: Path) -> None:
    saved = read_saved_config(run)
    if not saved:
        raise ConfigError(f"run {run.name!r} has no configuration: run 'refscore precompute' with it first")
    config = load_overrides(saved, [], str(run.config))
    if run.scored != run.pairs:
        raise ConfigError(
            f"run {run.name!r} learns from responses, and {format_name} takes pairs. {run.responses} is a table of token ids "
            "and scores that Polars reads; 'refscore show' prints it"
        )
    must_take(directory, format_name)
    if format_name == FAIRSEQ2:
        tokenizer = load_tokenizer(locate(config.reference), config.reference)
        exported = write_fairseq2(run.pairs, directory, tokenizer)
    else:
        exported = OF_PAIRS[format_name](run.pairs, directory)
    about = read_about(run.pairs)
    card = write_card(directory, format_name, exported, about, config.reference.model, config.policy.model)
    for path in [*exported.files, card]:
        console.say(str(path))
    for path in remove_stale(directory, exported):
        console.say(f"removed   {path}, of an earlier export")
    said = ", ".join(f"{count} {split}" for split, count in exported.pairs.items())
    console.say(f"pairs     {said}; the longest sequence has {exported.longest} tokens")
    for reason, count in exported.left_out.items():
        console.say(f"left out  {count} {reason}")


def _export_samples(run: Run, format_name: str, directory: Path) -> None:
    must_take(directory, format_name, with_card=False)
    samples = read_table(run.samples, SAMPLES)
    models = list(dict.fromkeys(samples["model"].to_pylist()))
    comparisons = comparisons_of(samples, held_out_prompts(run.scored, None), models)
    judgements = [Judgement(**row) for row in read_table(run.judgements, JUDGEMENTS).to_pylist()]
    for path in OF_SAMPLES[format_name](directory, comparisons, judgements):
        console.say(str(path))
