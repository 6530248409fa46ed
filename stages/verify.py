"""`refscore verify --run NAME`: are the stored scores true? A sample, scored again by transformers in float32."""

from __future__ import annotations

import time
from typing import Any

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, read_saved_config
from pipeline.artifacts.schemas import COMPUTED_BY, IMPORTED_BY
from pipeline.artifacts.tables import read_about
from pipeline.config.experiment import Config, ReferenceConfig
from pipeline.config.files import load_overrides
from pipeline.engines.protocol import numerics_of
from pipeline.engines.start import start_scorer
from pipeline.errors import CheckError, ConfigError
from pipeline.models.locate import locate_reference
from pipeline.precompute.agreement import agreement
from pipeline.precompute.verify import Sample, draw_sample, judge, problems
from pipeline.store.identity import IMPORTED
from stages import console

SHOWN = {
    "mean_signed_difference": "mean signed",
    "mean_absolute_difference": "mean",
    "max_absolute_difference": "max",
    "correlation_with_length": "corr. length",
    "margin_noise_nats": "margin noise",
    "margin_noise_reward": "in reward",
}


def main(run: Run, rows: int, engines: list[str]) -> None:
    """Score `rows` pairs, or responses, again; verify.json keeps the figures. Raises CheckError outside the tolerance.

    `engines` ("vllm", "transformers:bfloat16", ...) are measured on the same sample, beside what is stored.
    """
    saved = read_saved_config(run)
    if not saved:
        raise ConfigError(f"run {run.name!r} has no configuration: run 'refscore precompute' with it first")
    config = load_overrides(saved, [], str(run.config))
    others = {name: _configured(config, name) for name in engines}
    table = run.scored
    sample = draw_sample(table, rows)
    misfits = problems(config, table)

    # vLLM wants to be the first in a process, so what is compared comes before what it is compared with
    scores = {name: _score(reference, sample) for name, reference in others.items()}
    exact = {"engine": "transformers", "imported_by": None, "dtype": "float32", "logps": "exact"}
    oracle = config.reference.model_copy(update=exact)
    truth, _ = _score(oracle, sample)
    measured = {
        name: {**agreement(again, truth, config.train.beta), "tokens_per_second": speed}
        for name, (again, speed) in scores.items()
    }

    figures, about = sample.against(truth, config.train.beta), read_about(table)
    judged = judge(figures, str(about.get("dtype")), by_sum=bool(sample.sums))
    computed_by = about.get(COMPUTED_BY, {})
    for adopted, count in computed_by.items():
        judged["verdict"] += f"; {count} sequences of the run were computed by {adopted[:12]}, which was adopted"
    if misfits:
        judged |= {"passed": False, "verdict": "; ".join([*misfits, judged["verdict"]])}
    durable.write_json(
        run.directory / "verify.json",
        {
            **judged,
            **({IMPORTED_BY: about[IMPORTED_BY]} if IMPORTED_BY in about else {}),
            **({COMPUTED_BY: computed_by} if computed_by else {}),
            "compared": "sums" if sample.sums else "tokens",
            sample.unit: sample.rows,
            "beta": config.train.beta,
            **figures,
            "engines": measured,
        },
    )
    _show(sample, figures, measured)
    if not judged["passed"]:
        raise CheckError(judged["verdict"])
    whose = f" of {sample.rows} {sample.unit}, imported from {about[IMPORTED_BY]}," if IMPORTED_BY in about else ""
    console.say(f"passed{whose and f' for the scores{whose[:-1]}'}: {judged['verdict']}")


def _configured(config: Config, name: str) -> ReferenceConfig:
    engine, _, dtype = name.partition(":")
    values: dict[str, Any] = config.model_dump(mode="json")
    if engine == IMPORTED:
        raise ConfigError(f"--engines {name}: imported scores are what is compared, they cannot be computed")
    values["reference"] |= {"engine": engine, "dtype": dtype or "auto", "imported_by": None, "logps": "exact"}
    return load_overrides(values, [], f"--engines {name}").reference


def _score(reference: ReferenceConfig, sample: Sample) -> tuple[list[Any], float]:
    """Scores of the sample, and tokens per second once the engine is ready."""
    console.say(f"scoring {sample.rows} {sample.unit} with {reference.engine} {numerics_of(reference).dtype} ...")
    longest = max(map(len, sample.requests))
    with start_scorer(reference, locate_reference(reference).merged, numerics_of(reference), longest) as scorer:
        started = time.monotonic()
        scores = scorer.score(sample.requests)
        return scores, sum(map(len, sample.requests)) / (time.monotonic() - started)


def _show(sample: Sample, figures: dict[str, float], measured: dict[str, dict[str, float]]) -> None:
    of = f"{sample.rows} {sample.unit}, {figures['tokens']} response tokens"
    console.table(
        f"minus transformers float32, {of}; nats per token, margins in nats",
        ["scores", *SHOWN.values(), "tokens/s"],
        [
            [
                name,
                *(f"{values[key]:.2g}" for key in SHOWN),
                f"{values['tokens_per_second']:.0f}" if name != "stored" else "",
            ]
            for name, values in {"stored": figures, **measured}.items()
        ],
    )
