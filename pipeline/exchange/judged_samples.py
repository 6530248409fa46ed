"""Samples and verdicts in the files of AlpacaEval and Arena-Hard: other tools' judges can judge ours;
`pipeline.judges.annotations` reads what they said.

AlpacaEval: `outputs.json` lists {instruction, output, generator}; `annotations.json` adds two outputs and a preference
between 1 (the baseline, output_1) and 2 (the model, output_2), 1.5 a tie. Arena-Hard: JSONL of questions, of answers, and
of judgments with two games each, the baseline as A in the first and as B in the second; people are asked in one order, so
that one of their games says that it was not asked.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import durable
from pipeline.evaluation.rates.winrates import both_orders
from pipeline.judges.annotations import NOT_ASKED
from pipeline.judges.judging import Comparison, Judgement


def write_alpaca_eval(
    directory: Path, comparisons: Sequence[Comparison], judgements: Iterable[Judgement]
) -> list[Path]:
    """One `outputs_<model>.json` a model, and one `annotations_<judge>.json` a judge and compared models."""
    written = []
    outputs: dict[str, dict[tuple[str, int], dict[str, str]]] = defaultdict(dict)
    for item in comparisons:
        for model, response in ((item.model, item.response), (item.baseline, item.against)):
            row = {"instruction": item.prompt.text, "output": response.text, "generator": model, "dataset": "refscore"}
            outputs[model][item.prompt.prompt_id, item.sample] = row
    for model, rows in outputs.items():
        written.append(directory / f"outputs_{durable.file_name(model)}.json")
        durable.write_json(written[-1], list(rows.values()))
    for (judge, model, baseline), scores in _by_judge(judgements).items():
        annotations = [
            {
                "instruction": item.prompt.text,
                "output_1": item.against.text,
                "generator_1": baseline,
                "output_2": item.response.text,
                "generator_2": model,
                "dataset": "refscore",
                "annotator": judge,
                "preference": None if score is None else 1.0 + score,
            }
            for item in comparisons
            # people judge some comparisons only
            if item.key[2:] == (model, baseline) and item.key[:2] in scores
            for score in [scores[item.key[:2]]]
        ]
        written.append(directory / f"annotations_{durable.file_name(f'{judge}_{model}_{baseline}')}.json")
        durable.write_json(written[-1], annotations)
    return written


def write_arena_hard(directory: Path, comparisons: Sequence[Comparison], judgements: Iterable[Judgement]) -> list[Path]:
    """`question.jsonl`, `model_answer/<model>.jsonl`, `model_judgment/<judge>/<model>.jsonl`: one row per prompt and sample."""
    questions: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for item in comparisons:
        uid = _uid(item)
        category = item.prompt.topic or "none"
        questions[uid] = {"uid": uid, "category": category, "subcategory": category, "prompt": item.prompt.text}
        for model, response in ((item.model, item.response), (item.baseline, item.against)):
            turns = [
                {"role": "user", "content": item.prompt.text},
                {"role": "assistant", "content": {"answer": response.text}},
            ]
            tokens = {"token_len": len(response.ids)}
            answers[model][uid] = {
                "uid": uid,
                "ans_id": f"{uid}-{model}",
                "model": model,
                "messages": turns,
                "metadata": tokens,
            }
    written = [_jsonl(directory / "question.jsonl", questions.values())]
    written += [
        _jsonl(directory / "model_answer" / f"{durable.file_name(model)}.jsonl", rows.values())
        for model, rows in answers.items()
    ]
    items = {item.key: item for item in comparisons}
    judged: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for judgement in judgements:
        comparison = items.get(judgement.key)
        if comparison is None or judgement.order == "pair":
            continue
        row = judged[judgement.judge, judgement.model, judgement.baseline].setdefault(
            _uid(comparison),
            {
                "uid": _uid(comparison),
                "category": comparison.prompt.topic or "none",
                "judge": judgement.judge,
                "model": judgement.model,
                "baseline": judgement.baseline,
                "games": [NOT_ASKED, NOT_ASKED],
            },
        )
        baseline_is_a = judgement.order == f"{judgement.baseline}_first"
        row["games"][0 if baseline_is_a else 1] = {
            "score": _label(judgement.score, model_is_a=not baseline_is_a),
            "judgment": {"answer": ""},
        }
    for (judge, model, baseline), rows in judged.items():
        path = (
            directory
            / "model_judgment"
            / durable.file_name(f"{judge}_against_{baseline}")
            / f"{durable.file_name(model)}.jsonl"
        )
        written.append(_jsonl(path, rows.values()))
    return written


def _label(score: float | None, *, model_is_a: bool) -> str | None:
    if score is None:
        return None
    first = score if model_is_a else 1.0 - score
    return "A=B" if first == 0.5 else "A>B" if first > 0.5 else "B>A"


def _by_judge(judgements: Iterable[Judgement]) -> dict[tuple[str, str, str], dict[tuple[str, int], float | None]]:
    by_judge: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.order != "pair":
            by_judge[judgement.judge, judgement.model, judgement.baseline].append(judgement)
    return {
        key: {comparison: score.score for comparison, score in both_orders(rows).items()}
        for key, rows in by_judge.items()
    }


def _uid(item: Comparison) -> str:
    return f"{item.prompt.prompt_id}-{item.sample}"


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    durable.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
