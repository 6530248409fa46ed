"""`refscore pairs`: the trained policy answers its training prompts, a judge scores the answers, best meets worst."""

from __future__ import annotations

import json

import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.runs import Run, record
from pipeline.artifacts.tables import SAMPLES, read_about, read_table, write_table
from pipeline.config.experiment import Config, GenerateConfig
from pipeline.config.judges import IMPLICIT, JudgeConfig
from pipeline.engines.vllm.generator import Sample, generator, settled
from pipeline.errors import CheckError, ConfigError
from pipeline.evaluation.candidates import Candidate, policy_of
from pipeline.evaluation.new_pairs import Request, make_pairs, pair_row
from pipeline.evaluation.samples import generation_key, sample_rows, sample_table
from pipeline.judges.judging import Prompt
from pipeline.judges.open import Chamber, open_judge
from pipeline.models.load import chat_template_digest, load_tokenizer, vocabulary_digest
from pipeline.models.locate import locate_reference
from pipeline.pairs.stream import PairSet, build_pairs, prompt_id_of, prompt_text
from stages import console


def run(config: Config, run: Run) -> None:
    """Check; sample training prompts; judge; write new_pairs.jsonl, and the held-out pairs that go with it."""
    policy = policy_of(config, run)
    tokenizer = load_tokenizer(locate_reference(config.reference).merged, config.reference)
    pairs = build_pairs(config.data, tokenizer)
    requests = _training_prompts(pairs)[: config.generate.pair_prompts]
    settings_of_judge = pair_judge(config)
    chamber = Chamber(run.verdicts, config.judge, (vocabulary_digest(tokenizer), chat_template_digest(tokenizer)))
    judge = open_judge(settings_of_judge, chamber)
    settings = settled(config.generate, config.reference).model_copy(update={"samples": config.generate.pair_samples})
    console.say(
        f"prompts   {len(requests)} of the training split, {settings.samples} responses each, judged by {judge.name}"
    )

    samples = _sampled(run, policy, requests, settings)
    made, reasons = make_pairs(judge, requests, samples, config.generate.pair_margin)
    if not made:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise CheckError(f"no prompt gave a pair ({why}): lower generate.pair_margin or raise generate.pair_samples")

    provenance = {
        "run": run.name,
        "model": policy.described,
        "weights": policy.digest,
        "judge": judge.name,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    durable.write_text(run.new_pairs, "".join(json.dumps(pair_row(one, provenance)) + "\n" for one in made))
    held_out = [pair for pair in pairs.pairs if pair.split == "eval"]
    durable.write_text(
        run.held_out,
        "".join(
            json.dumps(
                {
                    **({"topic": pair.preference.topic} if pair.preference.topic else {}),
                    "prompt": pair.preference.prompt,
                    "chosen": [{"role": "assistant", "content": pair.preference.chosen}],
                    "rejected": [{"role": "assistant", "content": pair.preference.rejected}],
                }
            )
            + "\n"
            for pair in held_out
        ),
    )
    record(run, config, "pairs", pairs=len(made), left_out=reasons, judge=judge.name)
    for reason, count in reasons.items():
        console.say(f"left out  {count} x {reason}")
    console.say(f"pairs     {len(made)} in {run.new_pairs}")


def _training_prompts(pairs: PairSet) -> list[Request]:
    found: dict[str, Request] = {}
    for pair in pairs.pairs:
        if pair.split == "train":
            messages = pair.preference.prompt
            prompt_id = prompt_id_of(pair.prompt_ids)
            prompt = Prompt(prompt_id, prompt_text(messages), pair.preference.topic or "", pair.prompt_ids)
            found.setdefault(prompt_id, Request(prompt, messages))
    return list(found.values())


def pair_judge(config: Config) -> JudgeConfig:
    """The judge that makes new pairs. Raises ConfigError where no judge of texts is configured."""
    texts = [judge for judge in config.judge if judge.kind != IMPLICIT]
    wanted = config.generate.pair_judge
    found = next((judge for judge in texts if wanted in (None, judge.shown)), None)
    if found is None and wanted is not None:
        return JudgeConfig(name=wanted)
    if found is None:
        raise ConfigError("no judge of texts is configured, so nothing can say which response is better: set judge")
    return found


def _sampled(run: Run, policy: Candidate, requests: list[Request], settings: GenerateConfig) -> list[list[Sample]]:
    """Samples of the training prompts, made once for equal weights and settings."""
    prompts = [request.prompt for request in requests]
    key = generation_key(policy, prompts, settings)
    if read_about(run.pair_samples).get("key") == key:
        table = read_table(run.pair_samples, SAMPLES)
        console.say(f"samples   {len(table)} made before under the same settings")
    else:
        longest = max(len(prompt.ids) for prompt in prompts)
        with (
            generator(policy.base, policy.spec, longest, settings, policy.adapter) as generate,
            console.progress("sampling", len(prompts) * settings.samples) as ticker,
        ):
            found = generate([prompt.ids for prompt in prompts], settings, ticker.advance_tokens)
        table = sample_table(sample_rows("policy", prompts, found))
        write_table(run.pair_samples, table, {"key": key})
    return _grouped(table, settings.samples)


def _grouped(table: pa.Table, size: int) -> list[list[Sample]]:
    rows = [Sample(row["response"], row["response_ids"], row["finish_reason"]) for row in table.to_pylist()]
    return [rows[at : at + size] for at in range(0, len(rows), size)]
