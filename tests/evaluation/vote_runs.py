"""Runs that hold samples and what judges said of them, for tests of votes; and voters with opinions of their own."""

from __future__ import annotations

import pyarrow as pa

from pipeline.artifacts.runs import Run
from pipeline.artifacts.schemas import PAIRS, SAMPLES
from pipeline.artifacts.tables import write_table
from pipeline.evaluation.figures import judgements_table
from pipeline.judges.judging import Comparison, Judge, Prompt, Response, judge_both_orders
from pipeline.pairs.splits import prompt_id_of


def row_of(schema, **fields):
    """A row of `schema` in which what is not given is empty."""
    empty = {"string": "", "int32": 0, "int64": 0, "double": 0.0}
    return {field.name: fields.get(field.name, empty.get(str(field.type), [])) for field in schema}


def run_of(directory, texts, topics=("",), judges=()):
    """A run whose policy and reference wrote `texts`, (policy's, reference's) or a list of these for each prompt."""
    run = Run(directory)
    prompts = [(prompt_id_of([number]), number) for number in range(len(texts))]
    pairs, samples, items = [], [], []
    for (prompt_id, number), written in zip(prompts, texts, strict=True):
        topic, prompt = topics[number % len(topics)], f"prompt {number}"
        pairs.append(row_of(PAIRS, split="eval", prompt=prompt, topic=topic, prompt_ids=[number]))
        for sample, both in enumerate(written if isinstance(written, list) else [written]):
            for model, text in zip(("policy", "reference"), both, strict=True):
                about = {"prompt_id": prompt_id, "sample": sample, "model": model, "topic": topic, "prompt": prompt}
                samples.append(row_of(SAMPLES, **about, response=text, finish_reason="stop"))
            sides = (Response(text.strip(), "stop") for text in both)
            items.append(Comparison(Prompt(prompt_id, prompt, topic), sample, "policy", "reference", *sides))
    write_table(run.pairs, pa.Table.from_pylist(pairs, schema=PAIRS))
    write_table(run.samples, pa.Table.from_pylist(samples, schema=SAMPLES))
    said = [judgement for judge in judges for judgement in judge_both_orders(judge, items)]
    if judges:
        write_table(run.judgements, judgements_table(said))
    return run


def judge_by(name, likes):
    """A judge that prefers what `likes` marks higher; equal marks are ties."""
    return Judge(name, lambda duels: [_better(likes(duel.first.text), likes(duel.second.text)) for duel in duels])


def choice_by(likes, ballot):
    """The choice of a person with that opinion."""
    return {1.0: "first", 0.0: "second", 0.5: "tie"}[_better(likes(ballot.first), likes(ballot.second))]


def _better(first, second):
    return 0.5 if first == second else float(first > second)
