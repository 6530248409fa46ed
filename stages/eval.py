"""Stage three: generate with policy, reference and further models on held-out prompts, judge, measure KL, report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import KL, SAMPLES, read_about, write_table
from pipeline.config.experiment import Config, GenerateConfig
from pipeline.config.files import digest
from pipeline.config.judges import IMPLICIT
from pipeline.engines.protocol import numerics_of
from pipeline.engines.vllm.generator import generator, settled
from pipeline.errors import DataError
from pipeline.evaluation.candidates import Candidate, candidates, must_share_vocabulary
from pipeline.evaluation.figures import (
    cost_figures,
    judge_pairs,
    judge_texts,
    judgements_table,
    response_figures,
    win_figures,
    worst_first,
)
from pipeline.evaluation.kl import kl_table, on_policy, score_responses
from pipeline.evaluation.samples import (
    comparisons_of,
    generation_key,
    held_out_prompts,
    sample_rows,
    sample_table,
    shown,
    stored_samples,
)
from pipeline.judges.judging import Judgement, Prompt
from pipeline.judges.open import Chamber, open_judge
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.words import verdict
from stages import console, eval_tables


def run(config: Config, run: Run) -> None:
    """Check; implicit judge; generate with each model; KL; judge the texts; write figures and report."""
    models = candidates(config, run)
    names = [one.name for one in models]
    prompts = held_out_prompts(run.pairs, config.generate.max_prompts)
    if not prompts:
        raise DataError(
            f"{run.pairs} holds no eval pairs, so there is nothing to generate for: "
            "set data.eval_path or data.eval_fraction and run precompute again"
        )
    about = read_about(run.pairs)
    must_share_vocabulary(models, about.get("vocabulary"))
    # judges are opened before anything is generated: what is wrong with one is said at once
    chamber = Chamber(run.verdicts, config.judge, (about.get("vocabulary", ""), about.get("template", "")))
    judges = [open_judge(settings, chamber) for settings in config.judge if settings.kind != IMPLICIT]
    console.say(f"prompts   {len(prompts)} held out, for {', '.join(names)}")

    # the implicit judge first: vLLM pins this process's threads once it has run
    judgements: list[Judgement] = []
    held_out: dict[str, float] = {}
    for settings in config.judge:
        if settings.kind == IMPLICIT:
            judgements, held_out = judge_pairs(settings.shown, run.pairs, models[0].merged(), config)
            console.say(f"held-out  reward accuracy {held_out['reward_accuracy']:.3f} on {held_out['pairs']:.0f} pairs")

    # generate
    samples, free = _samples(config, run, prompts, models)
    kl = _kl(config, run, prompts, models, free)

    # judge
    comparisons = comparisons_of(samples, prompts, names)
    singles = [] if kl is None else shown(kl, prompts)
    rewards: dict[str, list[float | None]] = {}
    judge_costs: dict[str, dict[str, float]] = {}
    for judge in judges:
        found, given = judge_texts(judge, comparisons, singles)
        judgements += found
        if given:
            rewards[judge.name] = given
        if cost := judge.cost():
            judge_costs[judge.name] = cost
        failed = sum(one.score is None for one in found)
        console.say(f"judge     {judge.name}: {len(found)} verdicts, {failed} failed")
    write_table(run.judgements, judgements_table(judgements))

    # report
    figures: dict[str, Any] = {
        "models": {one.name: one.described for one in models},
        "pair_judge": config.generate.pair_judge,
        **win_figures(judgements, comparisons),
        "responses": response_figures(samples, names),
        "cost": cost_figures(kl, rewards),
        "judge_costs": judge_costs,
        "held_out": held_out,
    }
    side_by_side = worst_first(comparisons, judgements)
    figures = {"verdict": verdict(figures), **figures, "worse": side_by_side[:3]}
    durable.write_json(run.eval, figures)
    record(run, config, "eval", prompts=len(prompts), samples=len(samples), models={m.name: m.digest for m in models})
    write_report(run, config, figures, side_by_side)
    write_markdown(run, config, figures)
    eval_tables.show(figures)
    console.say(f"report    {run.report}")


def _samples(
    config: Config, run: Run, prompts: list[Prompt], models: list[Candidate]
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """samples.parquet, and the samples at temperature 1 that were made with it (those that no run has kept yet)."""
    settings = settled(config.generate, config.reference)
    free_settings = on_policy(config.generate, config.reference)
    keys = {one.name: generation_key(one, prompts, settings) for one in models}
    tables: dict[str, pa.Table] = {}
    free: dict[str, pa.Table] = {}
    lacking: list[str] = []
    for one in models:
        known = stored_samples(keys[one.name], one.name, run.samples.name, SAMPLES)
        if known is not None:
            console.say(f"samples   {one.name}: {len(known)} made before under the same settings")
            tables[one.name] = known
        if settings.kl_samples and _stored_kl(config, run, prompts, one, models[-1]) is None:
            lacking.append(one.name)
    for one in models:
        wanted = [] if one.name in tables else [settings]
        wanted += [free_settings] if one.name in lacking and free_settings not in wanted else []
        for dtype in sorted({each.dtype for each in wanted}):
            same_engine = [each for each in wanted if each.dtype == dtype]
            for each, table in _generate(one, prompts, same_engine):
                if each == settings:
                    tables[one.name] = table
                    _write(run, tables, keys)
                if each == free_settings:
                    free[one.name] = table
        if one.name in lacking and free_settings == settings:
            free[one.name] = tables[one.name]
    _write(run, tables, keys)
    return pa.concat_tables([tables[one.name] for one in models]), free


def _generate(
    one: Candidate, prompts: list[Prompt], settings: list[GenerateConfig]
) -> Iterator[tuple[GenerateConfig, pa.Table]]:
    """The model's samples under each of `settings`, which share a dtype, from one start of the engine."""
    longest, total = max(len(prompt.ids) for prompt in prompts), len(prompts) * sum(each.samples for each in settings)
    with (
        generator(one.base, one.spec, longest, settings[0], one.adapter) as generate,
        console.progress(f"{one.name} generates", total) as ticker,
    ):
        for each in settings:
            found = generate([prompt.ids for prompt in prompts], each, ticker.advance_tokens)
            yield each, sample_table(sample_rows(one.name, prompts, found))


def _kl(
    config: Config, run: Run, prompts: list[Prompt], models: list[Candidate], free: dict[str, pa.Table]
) -> pa.Table | None:
    """kl.parquet: samples at temperature 1 of every model, scored under their model and under the reference."""
    if not config.generate.kl_samples:
        return None
    reference = models[-1]
    tables = {
        one.name: known
        for one in models
        if one.name not in free and (known := _stored_kl(config, run, prompts, one, reference)) is not None
    }
    new = [one for one in models if one.name in free and one is not reference]
    if new:
        console.say(f"scoring   responses of {', '.join(one.name for one in new)} for KL, under each model")
        own = {one.name: score_responses(config.reference, one.merged(), prompts, free[one.name]) for one in new}
        together = pa.concat_tables([free[one.name] for one in new])
        under = iter(score_responses(config.reference, reference.merged(), prompts, together))
        for one in new:
            tables[one.name] = kl_table(free[one.name], own[one.name], [next(under) for _ in own[one.name]])
    if reference.name in free:
        tables[reference.name] = kl_table(free[reference.name], None, None)
    keys = {one.name: _kl_key(config, prompts, one, reference) for one in models}
    table = pa.concat_tables([tables[one.name] for one in models])
    write_table(run.kl, table, {"keys": keys})
    return table


def _stored_kl(
    config: Config, run: Run, prompts: list[Prompt], one: Candidate, reference: Candidate
) -> pa.Table | None:
    return stored_samples(_kl_key(config, prompts, one, reference), one.name, run.kl.name, KL)


def _kl_key(config: Config, prompts: list[Prompt], one: Candidate, reference: Candidate) -> str:
    made = generation_key(one, prompts, on_policy(config.generate, config.reference))
    return digest({"samples": made, "reference": reference.digest, "numerics": vars(numerics_of(config.reference))})


def _write(run: Run, tables: dict[str, pa.Table], keys: dict[str, str]) -> None:
    about = {"keys": {model: keys[model] for model in tables}}
    write_table(run.samples, pa.concat_tables(list(tables.values())), about)
