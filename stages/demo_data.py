"""Remakes the pairs of a demo from its prompts: `make demo-data`, or `DATA=bad_rule`, or `DATA=confirm`.

The same code as `refscore pairs`, with the embedded model as the policy and every fourth or fifth prompt of a topic held out.
data/<name>/README.md describes the rule for readers.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import durable
from pipeline.config.experiment import GenerateConfig
from pipeline.config.training import PolicyConfig
from pipeline.engines.vllm.generator import Sample, generator
from pipeline.evaluation.new_pairs import NewPair, make_pairs, pair_row
from pipeline.judges.judging import Judge, Prompt
from pipeline.judges.marks import ends_well
from pipeline.judges.rules import open_rule
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from pipeline.pairs.splits import prompt_id_of
from pipeline.rollouts.prompts import TrainingPrompt
from stages import console


@dataclass(frozen=True)
class Recipe:
    """How a demo's pairs are made: the judge that chooses, how samples are drawn, which best ones are taken, what is held out.

    `prompts` is a file, and `names` are the files that the pairs of each split are written to, beside it.
    """

    prompts: Path
    judge: str
    settings: GenerateConfig
    chat: bool
    eval_every: int
    per_topic: dict[str, int]
    # of a training prompt; the second is the next best against the next worst, and a held-out prompt has one
    pairs_per_prompt: int = 1
    margin: float = 0.25
    accept: Callable[[Sample], bool] = lambda _: True
    left_out: tuple[str, ...] = ("provenance",)
    names: tuple[tuple[str, str], ...] = (("train", "train.jsonl"), ("eval", "eval.jsonl"))


RECIPES = {
    "bad_rule": Recipe(
        prompts=Path("data/bad_rule/prompts.jsonl"),
        judge="rule:complete_and_concise",
        settings=GenerateConfig(max_tokens=160, temperature=0.7, samples=8, seed=20, dtype="bfloat16"),
        chat=True,
        eval_every=5,
        per_topic={"train": 19, "eval": 7},
        accept=lambda best: ends_well(best.text),
    ),
    "demo": Recipe(
        prompts=Path("data/demo/prompts.jsonl"),
        judge="rule:sentiment=vader:even",
        settings=GenerateConfig(
            max_tokens=32, fixed_length=True, temperature=1.0, samples=16, seed=20, dtype="float32"
        ),
        chat=False,
        eval_every=4,
        per_topic={"train": 36, "eval": 6},
        pairs_per_prompt=2,
        # what marks of completeness and relevance would say of half a sentence means nothing
        left_out=("provenance", "differs_beyond_length"),
    ),
}
# openings that no setting was chosen by: all of them are held out
RECIPES["confirm"] = replace(
    RECIPES["demo"],
    prompts=Path("data/demo/confirm_prompts.jsonl"),
    eval_every=1,
    names=(("eval", "confirm.jsonl"),),
)


def main(name: str) -> None:
    """Generate, pair, write, and say what came out."""
    recipe = RECIPES[name]
    requests, samples = _sampled(recipe)
    judge = open_rule(recipe.judge.removeprefix("rule:"), recipe.judge)
    rows_by_prompt, left_out = _rows(recipe, judge, requests, samples)

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    seen: dict[str, int] = defaultdict(int)
    kept: dict[tuple[str, str], int] = defaultdict(int)
    for request in requests:
        topic = request.prompt.topic
        split = "eval" if seen[topic] % recipe.eval_every == 0 else "train"
        seen[topic] += 1
        of_prompt = rows_by_prompt[request.prompt.prompt_id]
        for row in of_prompt if split == "train" else of_prompt[:1]:
            if kept[split, topic] < recipe.per_topic[split]:
                kept[split, topic] += 1
                kept_of_row = {name: value for name, value in row.items() if name not in recipe.left_out}
                # what made all of them, so that reports know it; the rest stands in the README beside the files
                rows[split].append({**kept_of_row, "provenance": {"judge": recipe.judge}})

    console.say(f"no pair from {sum(left_out.values())} of {len(requests)} prompts: {left_out or 'none'}")
    for split, file in recipe.names:
        path, of_split = recipe.prompts.with_name(file), rows[split]
        durable.write_text(path, "".join(json.dumps(row) + "\n" for row in of_split))
        beyond = sum(row.get("differs_beyond_length", False) for row in of_split)
        more = "" if "differs_beyond_length" in recipe.left_out else f", {beyond} differ in more than length"
        console.say(f"{path}: {len(of_split)} pairs, {len({row['topic'] for row in of_split})} topics{more}")


def _rows(
    recipe: Recipe, judge: Judge, requests: list[TrainingPrompt], samples: list[list[Sample]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The rows of each prompt's pairs, the clearest first, and why prompts have none."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    reasons: dict[str, int] = {}
    for number in range(recipe.pairs_per_prompt):
        pairs, left_out = make_pairs(
            judge, requests, samples, recipe.margin, recipe.accept, must_end=not recipe.settings.fixed_length
        )
        reasons = reasons if number else left_out
        for pair in pairs:
            rows[pair.request.prompt.prompt_id].append(pair_row(pair, {"judge": recipe.judge}))
        requests, samples = [pair.request for pair in pairs], [_others(pair) for pair in pairs]
    return rows, reasons


def _others(pair: NewPair) -> list[Sample]:
    return [
        sample for index, sample in enumerate(pair.samples) if index not in (pair.choice.chosen, pair.choice.rejected)
    ]


def _sampled(recipe: Recipe) -> tuple[list[TrainingPrompt], list[list[Sample]]]:
    spec = PolicyConfig()
    directory = locate(spec)
    tokenizer = load_tokenizer(directory, spec)
    requests = []
    for line in recipe.prompts.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        messages = [{"role": "user", "content": item["prompt"]}]
        text = item["prompt"]
        if recipe.chat:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(TrainingPrompt(Prompt(prompt_id_of(ids), item["prompt"], item["topic"], ids), messages))
    asked = [request.prompt.ids for request in requests]
    with (
        generator(directory, spec, max(map(len, asked)), recipe.settings) as generate,
        console.progress("sampling", len(asked) * recipe.settings.samples) as ticker,
    ):
        return requests, generate(asked, recipe.settings, ticker.advance_tokens)


if __name__ == "__main__":
    if sys.argv[1:2] not in [[name] for name in RECIPES]:
        sys.exit(f"name one demo to remake: {' or '.join(f'DATA={name}' for name in RECIPES)}")
    main(sys.argv[1])
