"""Stage three: generate with policy and reference on held-out prompts, judge, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import durable
from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import (
    MODELS,
    Prompt,
    comparisons_of,
    figures,
    generation_key,
    held_out_prompts,
    judge_all,
    judge_pairs,
    judgements_table,
    sample_model,
    stored_samples,
    worst_first,
)
from pipeline.judges import IMPLICIT, Judgement
from pipeline.models import ModelSpec, locate_reference
from pipeline.report import verdict, write_report
from pipeline.runs import Run, record
from pipeline.schema import write_table
from stages import console


def run(config: Config, run: Run) -> None:
    """Check; implicit judge; generate with each model; judge the texts; write figures and report."""
    if not (run.model / "config.json").is_file():
        raise ConfigError(f"{run.model} does not exist: run 'refscore train' with the same run first")
    prompts = held_out_prompts(run.pairs, config.generate.max_prompts)
    if not prompts:
        raise DataError(
            f"{run.pairs} holds no eval pairs, so there is nothing to generate for: "
            "set data.eval_path or data.eval_fraction and run precompute again"
        )
    console.say(f"prompts   {len(prompts)} held out")

    # the implicit judge first: vLLM pins this process's threads once it has run
    judgements: list[Judgement] = []
    held_out: dict[str, float] = {}
    if IMPLICIT in config.judge:
        judgements, held_out = judge_pairs(run.pairs, run.model, config)
        console.say(f"held-out  reward accuracy {held_out['reward_accuracy']:.3f} on {held_out['pairs']:.0f} pairs")

    samples = _samples(config, run, prompts)

    comparisons = comparisons_of(samples)
    judgements += judge_all(config, comparisons)
    write_table(run.judgements, judgements_table(judgements))

    found = figures(judgements, samples, comparisons) | {"held_out": held_out}
    durable.write_json(run.eval, {"verdict": verdict(found), **found})
    record(run, config, "eval", prompts=len(prompts), samples=len(samples))
    write_report(run, config, found, worst_first(comparisons))
    _show(found)
    console.say(f"report    {run.report}")


def _samples(config: Config, run: Run, prompts: list[Prompt]) -> pa.Table:
    """samples.parquet with both models; what was generated before under the same key is not generated again."""
    specs: dict[str, tuple[Path, ModelSpec]] = {
        "policy": (run.model, config.policy),
        "reference": (locate_reference(config.reference).merged, config.reference),
    }
    keys = {model: generation_key(specs[model][0], prompts, config) for model in MODELS}
    tables: dict[str, pa.Table] = {}
    for model in MODELS:
        known = stored_samples(keys[model], model)
        if known is not None:
            console.say(f"samples   {model}: {len(known)} made before under the same settings")
            tables[model] = known
    for model in MODELS:
        if model in tables:
            continue
        with console.progress(f"{model} generates", len(prompts) * config.generate.samples) as ticker:
            tables[model] = sample_model(model, *specs[model], prompts, config, ticker.advance_tokens)
        _write(run, tables, keys)
    _write(run, tables, keys)
    return pa.concat_tables([tables[model] for model in MODELS])


def _write(run: Run, tables: dict[str, pa.Table], keys: dict[str, str]) -> None:
    about = {"keys": {model: keys[model] for model in tables}}
    write_table(run.samples, pa.concat_tables(list(tables.values())), about)


def _show(found: dict[str, Any]) -> None:
    rows = [
        [
            name,
            str(rate["prompts"]),
            f"{rate['rate']['mean']:.3f}",
            f"{rate['rate']['low']:.3f} - {rate['rate']['high']:.3f}",
            f"{rate['wins']} / {rate['ties']} / {rate['losses']}",
            str(rate["failed"]),
        ]
        for name, rate in found["judges"].items()
        if rate
    ]
    console.table(
        "Policy against reference", ["judge", "prompts", "win rate", "95 % interval", "won/tied/lost", "failed"], rows
    )
    rows = [
        [
            model,
            f"{seen['tokens']['mean']:.1f}",
            f"{seen['words']:.1f}",
            f"{seen['cut_off']:.0%}",
            f"{seen['repetition']:.3f}",
        ]
        for model, seen in found["responses"].items()
    ]
    console.table("Responses", ["model", "tokens", "words", "cut off", "repetition"], rows)
    console.say(verdict(found))
