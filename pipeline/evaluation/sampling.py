"""Sampling the models of an evaluation and measuring their KL, once per model and settings: samples.parquet, kl.parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import KL, SAMPLES
from pipeline.artifacts.tables import list_column, write_table
from pipeline.config.experiment import GenerateConfig
from pipeline.config.files import digest
from pipeline.engines.reference import OpenedReference
from pipeline.engines.vllm.generator import generator, settled
from pipeline.errors import ConfigError
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.exact_kl import exact_divergence
from pipeline.evaluation.kl import kl_table, on_policy, requests_of, score_responses
from pipeline.evaluation.samples import generation_key, stored_samples
from pipeline.judges.judging import Prompt
from pipeline.progress import SILENT, Listener
from pipeline.rollouts.samples import sample_rows, sample_table


def make_samples(
    config: GenerateConfig,
    reference: OpenedReference,
    run: Run,
    prompts: Sequence[Prompt],
    models: Sequence[Candidate],
    listener: Listener = SILENT,
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Write samples.parquet; returns its rows, and per model the samples at temperature 1 whose KL no run has measured.

    The last of `models` is the one that KL is measured against. Samples that any run made under the same key are used
    again. An engine is started once per model and dtype, and what it made is written before the next one starts.
    """
    settings = settled(config, reference.numerics.dtype)
    kl_settings = on_policy(config, reference.numerics.dtype)
    keys = {model.name: generation_key(model, prompts, settings) for model in models}
    tables: dict[str, pa.Table] = {}
    kl_samples: dict[str, pa.Table] = {}
    without_kl: list[str] = []
    for model in models:
        stored = stored_samples(keys[model.name], model.name, run.samples.name, SAMPLES)
        if stored is not None:
            listener.say(f"samples   {model.name}: {len(stored)} made before under the same settings")
            tables[model.name] = stored
        if config.kl_samples and _stored_kl(config, reference, run, prompts, model, models[-1]) is None:
            without_kl.append(model.name)
    for model in models:
        wanted = [] if model.name in tables else [settings]
        wanted += [kl_settings] if model.name in without_kl and kl_settings not in wanted else []
        for dtype in sorted({setting.dtype for setting in wanted}):
            same_engine = [setting for setting in wanted if setting.dtype == dtype]
            for made_under, table in _generate(model, prompts, same_engine, listener):
                if made_under == settings:
                    tables[model.name] = table
                    _write(run, tables, keys)
                if made_under == kl_settings:
                    kl_samples[model.name] = table
        if model.name in without_kl and kl_settings == settings:
            kl_samples[model.name] = tables[model.name]
    _write(run, tables, keys)
    return pa.concat_tables([tables[model.name] for model in models]), kl_samples


def measure_kl(
    settings: GenerateConfig,
    reference: OpenedReference,
    run: Run,
    prompts: Sequence[Prompt],
    models: Sequence[Candidate],
    samples: Mapping[str, pa.Table],
    listener: Listener = SILENT,
) -> pa.Table | None:
    """Write kl.parquet and return its rows; None if no samples for KL are asked for.

    `samples`: those of the models whose KL no run has measured yet, at temperature 1; each is scored under its model and
    under the last of `models`, whose own are scored too: how likely they are is what others' are compared with.
    """
    if not settings.kl_samples:
        return None
    baseline = models[-1]
    tables = {
        model.name: stored
        for model in models
        if model.name not in samples
        and (stored := _stored_kl(settings, reference, run, prompts, model, baseline)) is not None
    }
    new = [model for model in models if model.name in samples]
    if new:
        listener.say(f"scoring   responses of {', '.join(model.name for model in new)} for KL, under each model")
        others = [model for model in new if model is not baseline]
        own = {model.name: score_responses(reference, model.merged(), prompts, samples[model.name]) for model in others}
        together = pa.concat_tables([samples[model.name] for model in new])
        under = iter(score_responses(reference, baseline.merged(), prompts, together))
        for model in new:
            ref_logps = [next(under) for _ in range(len(samples[model.name]))]
            tables[model.name] = kl_table(samples[model.name], own.get(model.name, ref_logps), ref_logps)
    for model in models:
        if model is not baseline and tables[model.name]["exact_kl"].null_count:
            tables[model.name] = _with_exact(tables[model.name], model, baseline, reference, prompts, listener)
    keys = {model.name: _kl_key(settings, reference, prompts, model, baseline) for model in models}
    table = pa.concat_tables([tables[model.name] for model in models])
    write_table(run.kl, table, {"keys": keys})
    return table


def _with_exact(
    table: pa.Table,
    model: Candidate,
    baseline: Candidate,
    reference: OpenedReference,
    prompts: Sequence[Prompt],
    listener: Listener,
) -> pa.Table:
    """The table with what `exact_divergence` says of its responses; unchanged, which is said, where that knows the models not."""
    listener.say(
        f"scoring   the distributions that responses of {model.name} were drawn from, for KL, under both models"
    )
    try:
        values = exact_divergence(model, baseline, requests_of(prompts, table), reference.numerics.dtype)
    except ConfigError as error:
        listener.say(f"no exact KL for {model.name}: {error}")
        return table
    field = KL.field("exact_kl")
    return table.set_column(table.schema.get_field_index(field.name), field, list_column(values, field.type))


def _generate(
    model: Candidate, prompts: Sequence[Prompt], settings: Sequence[GenerateConfig], listener: Listener
) -> Iterator[tuple[GenerateConfig, pa.Table]]:
    """The model's samples under each of `settings`, which share a dtype, from one start of the engine."""
    longest = max(len(prompt.ids) for prompt in prompts)
    responses = len(prompts) * sum(setting.samples for setting in settings)
    with (
        generator(model.base, model.spec, longest, settings[0], model.adapter) as generate,
        listener.progress(f"{model.name} generates", responses) as ticker,
    ):
        for setting in settings:
            samples = generate([prompt.ids for prompt in prompts], setting, ticker.advance_tokens)
            yield setting, sample_table(sample_rows(model.name, prompts, samples))


def _write(run: Run, tables: dict[str, pa.Table], keys: dict[str, str]) -> None:
    about = {"keys": {model: keys[model] for model in tables}}
    write_table(run.samples, pa.concat_tables(list(tables.values())), about)


def _stored_kl(
    settings: GenerateConfig,
    reference: OpenedReference,
    run: Run,
    prompts: Sequence[Prompt],
    model: Candidate,
    baseline: Candidate,
) -> pa.Table | None:
    """A model's rows of any run's kl.parquet that were made and scored under the same settings and models."""
    key = _kl_key(settings, reference, prompts, model, baseline)
    return stored_samples(key, model.name, run.kl.name, KL)


def _kl_key(
    settings: GenerateConfig,
    reference: OpenedReference,
    prompts: Sequence[Prompt],
    model: Candidate,
    baseline: Candidate,
) -> str:
    made = generation_key(model, prompts, on_policy(settings, reference.numerics.dtype))
    # fields that name nothing here stood in the keys of earlier versions too
    numerics = {"attention": "", "engine_args": "", **reference.numerics.described()}
    return digest({"samples": made, "reference": baseline.digest, "numerics": numerics})
