"""Remakes data/demo/{train,eval}.jsonl from data/demo/prompts.jsonl: `make demo-data`.

The same code as `refscore pairs`, with the embedded model as the policy and every fifth prompt of a topic held out.
data/demo/README.md describes the rule for readers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline.artifacts import durable
from pipeline.config.experiment import GenerateConfig
from pipeline.config.training import PolicyConfig
from pipeline.engines.vllm.generator import generator
from pipeline.evaluation.new_pairs import TrainingPrompt, make_pairs, pair_row
from pipeline.judges.judging import Prompt
from pipeline.judges.marks import ends_well
from pipeline.judges.rules import open_rule
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from pipeline.pairs.splits import prompt_id_of
from stages import console

DEMO = Path("data/demo")
MARGIN = 0.25
JUDGE = "rule:complete_and_concise"
EVAL_EVERY = 5  # every fifth prompt of a topic is held out
PER_TOPIC = {"train": 19, "eval": 7}
SETTINGS = GenerateConfig(max_tokens=160, temperature=0.7, samples=8, seed=20, dtype="bfloat16")


def main() -> None:
    """Generate, pair, write, and say what came out."""
    spec = PolicyConfig()
    directory = locate(spec)
    tokenizer = load_tokenizer(directory, spec)
    requests = []
    for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        messages = [{"role": "user", "content": item["prompt"]}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(TrainingPrompt(Prompt(prompt_id_of(ids), item["prompt"], item["topic"], ids), messages))

    prompts = [request.prompt.ids for request in requests]
    with (
        generator(directory, spec, max(map(len, prompts)), SETTINGS) as generate,
        console.progress("sampling", len(prompts) * SETTINGS.samples) as ticker,
    ):
        samples = generate(prompts, SETTINGS, ticker.advance_tokens)
    judge = open_rule(JUDGE.removeprefix("rule:"), JUDGE)
    pairs, _ = make_pairs(judge, requests, samples, MARGIN, accept=lambda best: ends_well(best.text))
    rows_by_prompt = {pair.request.prompt.prompt_id: pair_row(pair, {"judge": JUDGE}) for pair in pairs}

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen: dict[str, int] = defaultdict(int)
    kept: dict[tuple[str, str], int] = defaultdict(int)
    for request in requests:
        topic = request.prompt.topic
        split = "eval" if seen[topic] % EVAL_EVERY == 0 else "train"
        seen[topic] += 1
        row = rows_by_prompt.get(request.prompt.prompt_id)
        if row is not None and kept[split, topic] < PER_TOPIC[split]:
            kept[split, topic] += 1
            # one rule made them all, and the README beside the files names it
            rows[split].append({name: value for name, value in row.items() if name != "provenance"})

    for split, of_split in rows.items():
        path = DEMO / f"{split}.jsonl"
        durable.write_text(path, "".join(json.dumps(row) + "\n" for row in of_split))
        beyond = sum(row["differs_beyond_length"] for row in of_split)
        topics = len({row["topic"] for row in of_split})
        console.say(f"{path}: {len(of_split)} pairs, {topics} topics, {beyond} differ in more than length")


if __name__ == "__main__":
    main()
