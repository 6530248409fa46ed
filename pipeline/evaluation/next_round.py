"""Data for the next round: the run's policy answers its training prompts, a judge scores the answers, best meets worst."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_about, read_table, write_table
from pipeline.artifacts.writer import one_writer
from pipeline.config.experiment import Config, GenerateConfig
from pipeline.engines.reference import open_for_new
from pipeline.engines.vllm.generator import Sample, generator, settled
from pipeline.errors import CheckError
from pipeline.evaluation.candidates import Candidate, policy_of
from pipeline.evaluation.new_pairs import make_pairs, pair_row
from pipeline.evaluation.samples import generation_key
from pipeline.judges.open import JudgeContext, open_judge
from pipeline.models.load import chat_template_digest, vocabulary_digest
from pipeline.pairs.splits import Pair, build_pairs
from pipeline.progress import SILENT, Listener
from pipeline.rollouts.prompts import TrainingPrompt, judge_of_texts, training_prompts
from pipeline.rollouts.samples import sample_rows, sample_table


@dataclass(frozen=True)
class NewPairs:
    """How many pairs were made, and how many prompts gave none, by reason."""

    pairs: int
    left_out: dict[str, int]


@one_writer
def write_new_pairs(config: Config, run: Run, listener: Listener = SILENT) -> NewPairs:
    """Sample training prompts with the run's policy and judge; write new_pairs.jsonl and the held-out pairs beside it.

    Raises ConfigError if no judge of texts is configured, CheckError if no prompt gave a pair.
    """
    policy = policy_of(config, run)
    reference = open_for_new(config.reference, listener)
    tokenizer = reference.tokenizer
    pairs = build_pairs(config.data, tokenizer)
    prompts = training_prompts(pairs.pairs)[: config.generate.pair_prompts]
    made_by = (vocabulary_digest(tokenizer), chat_template_digest(tokenizer))
    context = JudgeContext(run.verdicts, config.judge, made_by, listener)
    judge = open_judge(judge_of_texts(config, config.generate.pair_judge), context)
    settings = settled(config.generate, reference.numerics.dtype)
    settings = settings.model_copy(update={"samples": config.generate.pair_samples})
    listener.say(
        f"prompts   {len(prompts)} of the training split, {settings.samples} responses each, judged by {judge.name}"
    )

    samples = _sampled(run, policy, prompts, settings, listener)
    new_pairs, left_out = make_pairs(
        judge, prompts, samples, config.generate.pair_margin, must_end=not config.generate.fixed_length
    )
    if not new_pairs:
        why = ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise CheckError(f"no prompt gave a pair ({why}): lower generate.pair_margin or raise generate.pair_samples")

    provenance = {
        "run": run.name,
        "model": policy.described,
        "weights": policy.digest,
        "judge": judge.name,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    durable.write_text(run.new_pairs, "".join(json.dumps(pair_row(pair, provenance)) + "\n" for pair in new_pairs))
    held_out = [_held_out_row(pair) for pair in pairs.pairs if pair.split == "eval"]
    durable.write_text(run.held_out, "".join(json.dumps(row) + "\n" for row in held_out))
    record(run, config, "pairs", pairs=len(new_pairs), left_out=left_out, judge=judge.name)
    return NewPairs(len(new_pairs), left_out)


def _held_out_row(pair: Pair) -> dict[str, object]:
    """The pair as a line of preference data."""
    return {
        **({"topic": pair.preference.topic} if pair.preference.topic else {}),
        "prompt": pair.preference.prompt,
        **{side: [pair.preference.response(side)] for side in ("chosen", "rejected")},
        **({"tools": pair.preference.tools} if pair.preference.tools else {}),
        **{f"{side}_cut_off": True for side in sorted(pair.preference.cut_off)},
    }


def _sampled(
    run: Run, policy: Candidate, requests: list[TrainingPrompt], settings: GenerateConfig, listener: Listener
) -> list[list[Sample]]:
    """Samples of the training prompts, made once for equal weights and settings."""
    prompts = [request.prompt for request in requests]
    key = generation_key(policy, prompts, settings)
    if read_about(run.pair_samples).get("key") == key:
        table = read_table(run.pair_samples, SAMPLES)
        listener.say(f"samples   {len(table)} made before under the same settings")
    else:
        longest = max(len(prompt.ids) for prompt in prompts)
        with (
            generator(policy.base, policy.spec, longest, settings, policy.adapter) as generate,
            listener.progress("sampling", len(prompts) * settings.samples) as ticker,
        ):
            responses = generate([prompt.ids for prompt in prompts], settings, ticker.advance_tokens)
        table = sample_table(sample_rows("policy", prompts, responses))
        write_table(run.pair_samples, table, {"key": key})
    return _grouped(table, settings.samples)


def _grouped(table: pa.Table, size: int) -> list[list[Sample]]:
    rows = [Sample(row["response"], row["response_ids"], row["finish_reason"]) for row in table.to_pylist()]
    return [rows[first : first + size] for first in range(0, len(rows), size)]
