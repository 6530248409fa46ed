"""Verdicts that other tools wrote, as a judge: files of AlpacaEval annotations and of Arena-Hard judgments.

What such files hold is described in `pipeline.report.exchange`, which writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.judges.judging import Duel, Judge

_ARENA = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}


def open_annotations(path: Path, name: str) -> Judge:
    """A judge whose verdicts stand in a file of AlpacaEval annotations or Arena-Hard judgments; others are failures.

    Arena-Hard's judgments lie in a folder as `write_arena_hard` makes it, beside the answers they are about.
    """
    rows = _read(path)
    scores = _arena_scores(path, rows) if rows and "games" in rows[0] else _alpaca_scores(path, rows)

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        return [scores.get((duel.prompt.text, duel.first.text, duel.second.text)) for duel in duels]

    return Judge(name, prefer)


_Scores = dict[tuple[str, str, str], float | None]


def _alpaca_scores(path: Path, rows: list[dict[str, Any]]) -> _Scores:
    scores: _Scores = {}
    for number, row in enumerate(rows):
        try:
            preference = row["preference"]
            # 0 is an old way to write a draw
            score = None if preference is None else 0.5 if preference == 0 else 2.0 - float(preference)
            if score is not None and not 0 <= score <= 1:
                raise ValueError(preference)
            texts = (row["instruction"], row["output_1"], row["output_2"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: not an AlpacaEval annotation ({error!r})") from None
        scores[texts] = score
        # one order was asked; the other says the same
        scores[texts[0], texts[2], texts[1]] = None if score is None else 1.0 - score
    return scores


def _arena_scores(path: Path, rows: list[dict[str, Any]]) -> _Scores:
    base = path.parent.parent.parent
    questions = {row["uid"]: row["prompt"] for row in _read(base / "question.jsonl")}
    answers: dict[tuple[str, str], str] = {}
    for file in sorted((base / "model_answer").glob("*.jsonl")):
        for row in _read(file):
            said = row["messages"][-1]["content"]
            answers[row["model"], row["uid"]] = said["answer"] if isinstance(said, dict) else str(said)
    scores: _Scores = {}
    for number, row in enumerate(rows):
        try:
            baseline, model = (answers[row[name], row["uid"]] for name in ("baseline", "model"))
            prompt = questions[row["uid"]]
            for game, texts in zip(row["games"], ((baseline, model), (model, baseline)), strict=True):
                scores[prompt, *texts] = _ARENA.get(str((game or {}).get("score")).strip("[]"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: not an Arena-Hard judgment with its answers ({error!r})") from None
    return scores


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects")
    return rows
