"""Remakes data/demo/{train,eval}.jsonl from data/demo/prompts.jsonl: `make demo-data`.

Samples several responses to every prompt from the embedded model, marks them by `pipeline.rules`, pairs the best with
the worst, and leaves near-ties out. data/demo/README.md describes the rule for readers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline import durable
from pipeline.config import GenerateConfig, PolicyConfig
from pipeline.generate import Sample, generate
from pipeline.models import load_tokenizer, locate
from pipeline.pairing import best_and_worst
from pipeline.rules import Marks, marks, words_of
from stages import console

DEMO = Path("data/demo")
MARGIN = 0.25
EVAL_EVERY = 5  # every fifth prompt of a topic is held out
PER_TOPIC = {"train": 19, "eval": 7}
SETTINGS = GenerateConfig(max_tokens=160, temperature=0.7, samples=8, seed=20)


def run() -> None:
    """Generate, pair, write, and say what came out."""
    prompts = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    spec = PolicyConfig()
    directory = locate(spec)
    tokenizer = load_tokenizer(directory, spec)
    ids = []
    for item in prompts:
        turn = [{"role": "user", "content": item["prompt"]}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])

    with console.progress("sampling", len(ids) * SETTINGS.samples) as ticker:
        responses = generate(directory, spec, ids, SETTINGS, ticker.advance_tokens)

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen: dict[str, int] = defaultdict(int)
    kept: dict[tuple[str, str], int] = defaultdict(int)
    for item, samples in zip(prompts, responses, strict=True):
        topic = item["topic"]
        split = "eval" if seen[topic] % EVAL_EVERY == 0 else "train"
        seen[topic] += 1
        row = _pair(item["prompt"], samples)
        if row is not None and kept[split, topic] < PER_TOPIC[split]:
            kept[split, topic] += 1
            rows[split].append({"topic": topic, **row})

    for split, found in rows.items():
        path = DEMO / f"{split}.jsonl"
        durable.write_text(path, "".join(json.dumps(row) + "\n" for row in found))
        beyond = sum(row["differs_beyond_length"] for row in found)
        topics = len({row["topic"] for row in found})
        console.say(f"{path}: {len(found)} pairs, {topics} topics, {beyond} differ in more than length")


def _pair(prompt: str, samples: list[Sample]) -> dict[str, Any] | None:
    seen = [marks(prompt, sample.text, sample.finish_reason) for sample in samples]
    choice = best_and_worst([one.score for one in seen], MARGIN)
    if choice is None or not seen[choice.chosen].complete or not samples[choice.rejected].text:
        return None
    chosen, rejected = samples[choice.chosen], samples[choice.rejected]
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "margin": round(choice.margin, 3),
        "differs_beyond_length": _beyond_length(seen[choice.chosen], seen[choice.rejected], chosen.text, rejected.text),
    }


def _beyond_length(chosen: Marks, rejected: Marks, chosen_text: str, rejected_text: str) -> bool:
    """Whether the rule prefers `chosen` for what it says too, or at about equal length."""
    lengths = sorted((len(words_of(chosen_text)), len(words_of(rejected_text))))
    return (
        chosen.distinct - rejected.distinct >= 0.1
        or chosen.relevant - rejected.relevant >= 0.25
        or lengths[0] >= 0.8 * lengths[1]
    )


if __name__ == "__main__":
    run()
