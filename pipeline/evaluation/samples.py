"""samples.parquet: held-out prompts and what each model writes to them, made once for equal weights and settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.runs import RUNS
from pipeline.artifacts.schemas import PAIRS, RESPONSES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.experiment import GenerateConfig
from pipeline.evaluation.candidates import Candidate
from pipeline.judges.judging import Comparison, Prompt, Response, Shown
from pipeline.pairs.splits import prompt_id_of
from pipeline.rollouts.samples import response_of, samples_key


def held_out_prompts(table: Path, limit: int | None) -> list[Prompt]:
    """Distinct prompts of the eval split, in the order of pairs.parquet or responses.parquet."""
    prompts: dict[str, Prompt] = {}
    schema = RESPONSES if read_about(table).get("data", "pairs") != "pairs" else PAIRS
    for row in read_table(table, schema, ["split", "prompt", "topic", "prompt_ids"]).to_pylist():
        if row["split"] == "eval":
            prompt_id = prompt_id_of(row["prompt_ids"])
            prompts.setdefault(prompt_id, Prompt(prompt_id, row["prompt"], row["topic"] or "", row["prompt_ids"]))
    return list(prompts.values())[:limit]


def generation_key(candidate: Candidate, prompts: Sequence[Prompt], settings: GenerateConfig) -> str:
    """Digest of all that decides the samples of a model: equal keys, equal samples."""
    return samples_key(candidate.digest, prompts, settings)


def stored_samples(key: str, model: str, file: str, schema: pa.Schema) -> pa.Table | None:
    """Rows made before under the same key by any run, from its `file`, under the name `model` here."""
    for path in sorted(RUNS.glob(f"*/{file}")):
        for name, stored_key in read_about(path).get("keys", {}).items():
            if stored_key == key:
                table = read_table(path, schema)
                rows = table.filter(pc.equal(table["model"], name))
                return rows.set_column(rows.schema.get_field_index("model"), "model", pa.array([model] * len(rows)))
    return None


def shown(table: pa.Table, prompts: Sequence[Prompt]) -> list[Shown]:
    """A table's responses as judges see them."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [Shown(by_id[row["prompt_id"]], response_of(row)) for row in table.to_pylist()]


def comparisons_of(
    samples: pa.Table, prompts: Sequence[Prompt], models: Sequence[str], against: str | None = None
) -> list[Comparison]:
    """Every two models' samples of the same prompt and number, the model that `models` lists later as the baseline.

    `against`: only those in which this model is the baseline.
    """
    responses: dict[tuple[str, int], dict[str, Response]] = defaultdict(dict)
    for row in samples.to_pylist():
        responses[row["prompt_id"], row["sample"]][row["model"]] = response_of(row)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [
        Comparison(by_id[prompt_id], number, model, baseline, both[model], both[baseline])
        for model, baseline in combinations(models, 2)
        if against in (None, baseline)
        for (prompt_id, number), both in responses.items()
        if model in both and baseline in both
    ]
