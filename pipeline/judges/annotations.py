"""Verdicts that other tools wrote, as a judge: files of AlpacaEval annotations and of Arena-Hard judgments.

What such files hold is described in `pipeline.exchange.judged_samples`, which writes them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.judges.judging import Duel, Judge, majority

_ARENA = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}
# of two games of Arena-Hard, the one in whose order nobody was asked: no failure
NOT_ASKED: dict[str, Any] = {"score": None, "judgment": {"answer": ""}, "asked": False}
_Texts = tuple[str, str, str]


@dataclass(frozen=True)
class Vote:
    """What one voice said of two responses in the order it saw them: 1 the first is better, 0 the second, None nothing.

    `price`: what it took, if the file says so.
    """

    prompt: str
    first: str
    second: str
    score: float | None
    price: float | None = None

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.prompt, self.first, self.second


def open_annotations(path: Path, name: str) -> Judge:
    """A judge whose verdicts stand in a file of AlpacaEval annotations or Arena-Hard judgments; others are failures.

    Of several verdicts on the same responses in the same order the majority counts. Arena-Hard's judgments lie in a folder as
    `write_arena_hard` makes it, beside the answers they are about.
    """
    said: dict[_Texts, list[float | None]] = defaultdict(list)
    turned: dict[_Texts, list[float | None]] = defaultdict(list)
    for vote in read_votes(path):
        said[vote.texts].append(vote.score)
        turned[vote.prompt, vote.second, vote.first].append(None if vote.score is None else 1.0 - vote.score)

    def prefer(duels: Sequence[Duel]) -> list[float | None]:
        asked = [(duel.prompt.text, duel.first.text, duel.second.text) for duel in duels]
        # where one order was asked, the other says the same
        return [_one(said.get(texts) or turned.get(texts) or [None]) for texts in asked]

    return Judge(name, prefer)


def read_votes(path: Path) -> list[Vote]:
    """Every verdict of a file of AlpacaEval annotations or Arena-Hard judgments. Raises DataError for other files.

    Where rows say which sample they are about, as the votes of a run do, the last of each annotator on the same responses counts.
    """
    rows = _read(path)
    return _arena_votes(path, rows) if rows and "games" in rows[0] else _alpaca_votes(path, rows)


def _one(scores: Sequence[float | None]) -> float | None:
    return scores[0] if len(scores) == 1 else majority(scores)


def _alpaca_votes(path: Path, rows: list[dict[str, Any]]) -> list[Vote]:
    votes: dict[Any, Vote] = {}
    for number, row in enumerate(rows):
        try:
            preference, price = row["preference"], row.get("price_per_example")
            # 0 is an old way to write a draw
            score = None if preference is None else 0.5 if preference == 0 else 2.0 - float(preference)
            if score is not None and not 0 <= score <= 1:
                raise ValueError(preference)
            texts = (str(row["instruction"]), str(row["output_1"]), str(row["output_2"]))
            what = _sample_of(row, texts) or number
            votes.pop(what, None)
            votes[what] = Vote(*texts, score, None if price is None else float(price))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: not an AlpacaEval annotation ({error!r})") from None
    return list(votes.values())


def _sample_of(row: dict[str, Any], texts: _Texts) -> tuple[Any, ...] | None:
    """Who voted on what, in rows of a run's votes (`pipeline.evaluation.votes.record`); None in those of other tools."""
    who = tuple(str(row.get(name)) for name in ("annotator", "prompt_id", "sample", "baseline"))
    return None if "prompt_id" not in row else (*who, texts[0], frozenset(texts[1:]))


def _arena_votes(path: Path, rows: list[dict[str, Any]]) -> list[Vote]:
    base = path.parent.parent.parent
    questions = dict(_arena_rows(base / "question.jsonl", "question", lambda row: (row["uid"], row["prompt"])))
    answers: dict[tuple[str, str], str] = {}
    for file in sorted((base / "model_answer").glob("*.jsonl")):
        answers.update(_arena_rows(file, "answer", lambda row: ((row["model"], row["uid"]), _answer(row))))
    votes = []
    for number, row in enumerate(rows):
        try:
            baseline, model = (answers[row[name], row["uid"]] for name in ("baseline", "model"))
            prompt = questions[row["uid"]]
            for game, texts in zip(row["games"], ((baseline, model), (model, baseline)), strict=True):
                if game == NOT_ASKED:
                    continue
                votes.append(Vote(prompt, *texts, _ARENA.get(str((game or {}).get("score")).strip("[]"))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}, row {number}: not an Arena-Hard judgment with its answers ({error!r})") from None
    return votes


def _arena_rows(path: Path, what: str, read: Callable[[dict[str, Any]], tuple[Any, Any]]) -> Iterator[tuple[Any, str]]:
    """(key, text) of every row of a file of Arena-Hard. Raises DataError for a row that is not `what`."""
    for number, row in enumerate(_read(path)):
        try:
            key, text = read(row)
            hash(key)
            if not isinstance(text, str):
                raise TypeError(f"expected text, got {type(text).__name__}")
        except (LookupError, TypeError) as error:
            raise DataError(f"{path}, row {number}: not an Arena-Hard {what} ({error!r})") from None
        yield key, text


def _answer(row: dict[str, Any]) -> Any:
    said = row["messages"][-1]["content"]
    return said["answer"] if isinstance(said, dict) else said


def _read(path: Path) -> list[dict[str, Any]]:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file: verdicts are read from a file of JSON or JSONL")
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects")
    return rows
