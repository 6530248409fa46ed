"""What kind of data rows are - pairs, unpaired responses, ranked lists, prompts - and what each becomes for the loss that reads it.

Pairs serve every loss: as they are, as a good and a bad response, or as a list of two. Ranked lists become pairs or lists.
A single response with a label makes no pair. Where samples are learnt from, a row of any kind is its prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

from pipeline.config.losses import LOSS_FACTS, Data
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.formats import FORMATS, detect_format, shown
from pipeline.pairs.formats import unread as unread_of_pairs
from pipeline.pairs.messages import Message, RowProblem
from pipeline.pairs.ranked import first_as_pair, is_ranked, list_column, score_column, scored_responses, unread_fields
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.single import (
    LABELS,
    as_pair,
    asked,
    is_prompt,
    is_unpaired,
    label_column,
    label_of,
    response_column,
)

Kind = Literal["pairs", "unpaired", "ranked", "prompts"]
# which responses of a list make pairs: data.lists
Lists = Literal["best_worst", "all_pairs"]

# what examples of each kind of data are called
UNITS: dict[Data, str] = {"pairs": "pairs", "responses": "responses", "lists": "ranked lists", "prompts": "prompts"}
_OF_PROMPTS = "train.objective=policy_gradient learns from samples, which 'refscore rollout' makes of prompts"
# columns of two scores by which real data say how much better chosen is, beside a column `margin`
_TWO_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)
# two equal texts have nothing but a beginning in common
_NO_PROMPT = "TRL implicit, strings"


@dataclass(frozen=True)
class Form:
    """How the rows of a file are read: their kind, and the form in which prompt and responses stand.

    `problem`: of prompts that stand beside something else, why the rows are of no other kind.
    """

    kind: Kind
    format: str
    problem: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """The form for people."""
        return self.format if self.kind == "pairs" else f"{self.kind}, {self.format}"


@dataclass(frozen=True)
class Said:
    """What a row says of one response, `chosen`, or of two: messages, and what the data thinks of them. Of a prompt alone `chosen`
    is empty.
    """

    prompt: list[Message]
    chosen: Message = field(default_factory=dict)
    rejected: Message | None = None
    label: bool | None = None
    score: float | None = None
    margin: float | None = None
    cut_off: frozenset[str] = field(default_factory=frozenset)


# what rows of a kind other than pairs are told by, and the pair that each is read as
_KINDS: list[tuple[Kind, Callable[[Row], bool], Callable[[Row], Row]]] = [
    ("unpaired", is_unpaired, as_pair),
    ("ranked", is_ranked, first_as_pair),
]


def detect(name: str, rows: list[Row], *, chat: bool = True) -> Form:
    """The kind and the form of most of `rows`; DataError with what they are if they are of none that is known."""
    for kind, fits, as_rows in _KINDS:
        fitting = [row for row in rows if fits(row)]
        if len(fitting) * 2 < len(rows) or (kind == "unpaired" and _is_a_scale(rows)):
            continue
        pairs = [found for row in fitting if (found := _or_nothing(as_rows, row))]
        try:
            # rows that cannot be read do not hide what the others are
            format_name = detect_format(name, pairs, chat=chat) if pairs else ""
        except DataError:
            continue
        if format_name and format_name != _NO_PROMPT:
            return Form(kind, format_name)
    try:
        return Form("pairs", detect_format(name, rows, chat=chat))
    except DataError as problem:
        prompts = [row for row in rows if is_prompt(row)]
        if not prompts or len(prompts) * 2 < len(rows):
            raise
        format_name = detect_format(name, [asked(row) for row in prompts], chat=chat)
        alone = Form("prompts", format_name)
        # an answer behind a request, or in a column that is none of a prompt's
        more = any({**asked(row), **row} != asked(row) or any(unread(row, alone)) for row in prompts)
        return Form("prompts", format_name, str(problem)) if more else alone


def other_form(row: Row, form: Form) -> str:
    """The form that a row has that cannot be read as its file's; empty if it has no other."""
    forms = [Form("pairs", title) for title, known in FORMATS.items() if known.fits(row)]
    for kind, fits, as_rows in _KINDS:
        pair = _or_nothing(as_rows, row) if fits(row) else None
        forms += [Form(kind, title) for title, known in FORMATS.items() if pair is not None and known.fits(pair)]
    found = form if not forms or form in forms else forms[0]
    return "" if found == form else f"the row is {found.title}, the file {form.title}: one form for each file"


def must_serve(name: str, form: Form, wanted: Data | None, lists: Lists) -> None:
    """Raise DataError if a file of this form cannot be what the loss reads (None: what the file is), with the way out."""
    if form.kind == "prompts" and form.problem and wanted != "prompts":
        raise DataError(f"{form.problem}. Or take its prompts alone: {_OF_PROMPTS}")
    if wanted is None:
        return
    if form.kind == "prompts" and wanted != "prompts":
        raise DataError(
            f"{name}: the file holds prompts and no responses, which make no {UNITS[wanted]}: {_OF_PROMPTS}"
        )
    if form.kind == "unpaired" and wanted not in ("responses", "prompts"):
        losses = " or ".join(loss for loss, facts in LOSS_FACTS.items() if facts.data == "responses")
        raise DataError(
            f"{name}: the file is unpaired data as KTO learns from (one response a row, with a label), which makes no "
            f"{UNITS[wanted]}: train.loss_type={losses} learn from it, and train.objective=policy_gradient from its prompts; if "
            "pairs are needed, make one row of prompt, chosen and rejected of a response that is wanted and one that is not"
        )
    if form.kind == "ranked" and wanted == "responses" and lists == "all_pairs":
        raise ConfigError(
            f"{name}: with data.lists=all_pairs a response of a ranked list is good in one pair and bad in another, and the loss "
            "learns from single responses: take data.lists=best_worst, by which the best is good and the worst is bad"
        )


def says(row: Row, form: Form, wanted: Data | None, lists: Lists) -> list[Said | RowProblem]:
    """What a row becomes for a loss that reads `wanted` (None: what it is), in parts; RowProblem if that is nothing.

    A part that is left out for itself is given as its RowProblem beside the others.
    """
    if wanted == "prompts" or form.kind == "prompts":
        return [Said(_prompt_of(row, form))]
    if form.kind == "unpaired":
        single = _convert(as_pair(row), form.format, response_column(row) or "response")
        return [replace(single, rejected=None, label=label_of(row))]
    if form.kind == "pairs":
        pair = _convert(row, form.format)
        return [replace(pair, margin=margin_of(row))] if wanted in (None, "pairs") else _parted(pair, wanted)
    ranking, problems = _ranking(row, form.format)
    if wanted in (None, "lists"):
        return [*ranking, *problems]
    pairs = _pairs_of(ranking, lists)
    return [*(pairs if wanted == "pairs" else [half for pair in pairs for half in _parted(pair, wanted)]), *problems]


def unread(row: Row, form: Form) -> Iterable[str]:
    """Columns of a row, and fields of its messages, that nothing reads."""
    if form.kind == "pairs":
        if names := list(unread_of_pairs(row, form.format)):
            read = _margin_columns(row)
            yield from (name for name in names if name not in read)
        if row.get("margin") is not None and _finite(row["margin"]) is None:
            yield "margin"
        return
    if form.kind == "ranked":
        dropped = {list_column(row), score_column(row)}
        yield from map(shown, unread_fields(row))
        yield from unread_of_pairs({name: value for name, value in row.items() if name not in dropped}, form.format)
        return
    if form.kind == "prompts":
        yield from unread_of_pairs(asked(row), form.format)
        return
    column, label = response_column(row), label_column(row)
    pair = _or_nothing(as_pair, row) or {}
    others = {name: row[name] for name in LABELS if name in row and name != label}
    for name in unread_of_pairs({**pair, **others, "rejected": None}, form.format):
        yield name.replace("chosen", str(column), 1) if name.startswith("chosen[]") else name


def margin_of(row: Row) -> float | None:
    """How much better a row says its chosen response is: `margin`, or the difference of two scores; None if it does not say."""
    columns = _margin_columns(row)
    values = [_finite(row[name]) for name in columns]
    numbers = [value for value in values if value is not None]
    if len(columns) == 2:
        return numbers[0] - numbers[1]
    return numbers[0] if numbers else None


def _margin_columns(row: Row) -> tuple[str, ...]:
    if _finite(row.get("margin")) is not None:
        return ("margin",)
    return next((two for two in _TWO_SCORES if all(_finite(row.get(name)) is not None for name in two)), ())


def _finite(value: object) -> float | None:
    """A number, or a text of CSV that is one."""
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_a_scale(rows: list[Row]) -> bool:
    """Whether the label is a rating of more than two steps, of which 1 may be the worst."""
    for row in rows:
        column = label_column(row)
        value = _finite(row.get(column)) if column == "rating" else None
        if value is not None and value not in (-1, 0, 1):
            return True
    return False


def _or_nothing(change: Callable[[Row], Row], row: Row) -> Row | None:
    try:
        return change(row)
    except RowProblem:
        return None


def _convert(row: Row, format_name: str, named: str | None = None) -> Said:
    """A row of a pair's form; `named`: what its response is called where it stands on both sides."""
    try:
        prompt, chosen, rejected = FORMATS[format_name].convert(row)
        return Said(prompt, chosen, rejected, cut_off=_cut_off(row))
    except RowProblem as problem:
        if named is None:
            raise
        raise RowProblem(problem.reason, called(problem.detail, named)) from None


def called(detail: str, name: str) -> str:
    """A sentence about a response that stood as a pair's chosen one, with the name that it has."""
    return detail.replace("chosen and rejected", name).replace("chosen", name, 1)


def _cut_off(row: Row) -> frozenset[str]:
    """Sides whose column `<side>_cut_off` is true."""
    given = {side: row.get(f"{side}_cut_off") for side in ("chosen", "rejected")}
    for side, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise RowProblem("wrong_type", f"{side}_cut_off is {type(value).__name__}, expected true or false")
    return frozenset(side for side, value in given.items() if value)


def _parted(pair: Said, wanted: Data | None) -> list[Said | RowProblem]:
    """A pair as two responses: a good and a bad one, or the first and the second of a list."""
    if pair.rejected is None or pair.chosen == pair.rejected:
        raise RowProblem("identical_responses")
    cut = ["chosen" in pair.cut_off, "rejected" in pair.cut_off]
    halves = [
        Said(pair.prompt, message, cut_off=frozenset(["chosen"] if is_cut else []))
        for message, is_cut in zip((pair.chosen, pair.rejected), cut, strict=True)
    ]
    if wanted == "responses":
        return [replace(half, label=good) for half, good in zip(halves, (True, False), strict=True)]
    return [replace(half, score=score) for half, score in zip(halves, (-1.0, -2.0), strict=True)]


def _prompt_of(row: Row, form: Form) -> list[Message]:
    """What is asked in a row of any kind, whatever is answered."""
    as_rows: dict[Kind, Callable[[Row], Row]] = {"unpaired": as_pair, "ranked": first_as_pair, "prompts": asked}
    return _convert(as_rows.get(form.kind, dict)(row), form.format).prompt


def _ranking(row: Row, format_name: str) -> tuple[list[Said], list[RowProblem]]:
    """The responses of a list, the best first, and why others are not among them. RowProblem if fewer than two are left."""
    read: list[Said] = []
    problems: list[RowProblem] = []
    found = scored_responses(row)
    for number, one in enumerate(found, 1):
        where = f"response {number} of {len(found)}"
        if isinstance(one, RowProblem):
            problems.append(one)
            continue
        response, score = one
        try:
            said = replace(_convert(response, format_name, where), rejected=None, score=score)
        except RowProblem as problem:
            detail = problem.detail if where in problem.detail else f"{where}: {problem.detail}".removesuffix(": ")
            problems.append(RowProblem(problem.reason, detail))
            continue
        if not said.chosen["content"].strip() and not said.chosen.get("tool_calls"):
            problems.append(RowProblem("empty_response", where))
        elif any(said.chosen == other.chosen for other in read):
            problems.append(RowProblem("identical_responses", f"{where} says what one before it says"))
        elif read and said.prompt != read[0].prompt:
            problems.append(RowProblem("diverges_before_last_turn", f"{where} answers another prompt than the first"))
        else:
            read.append(said)
    if len(read) < 2:
        why = "; ".join(f"{problem.reason} {problem.detail}".strip() for problem in problems)
        if not read and len({problem.reason for problem in problems}) == 1:
            raise problems[0]
        raise RowProblem("fewer_than_two_responses", why or f"{len(found)} in the row")
    if len({said.score for said in read}) == 1:
        raise RowProblem("equal_scores", f"all {len(read)} responses have the score {read[0].score:g}")
    return sorted(read, key=lambda said: -(said.score or 0.0)), problems


def _pairs_of(ranking: list[Said], lists: Lists) -> list[Said]:
    """The best against the worst, or each against every one that is worse."""
    both = [(ranking[0], ranking[-1])] if lists == "best_worst" else list(combinations(ranking, 2))
    differences = [(one.score or 0.0) - (other.score or 0.0) for one, other in both]
    return [
        Said(one.prompt, one.chosen, other.chosen, margin=margin)
        for (one, other), margin in zip(both, differences, strict=True)
        if margin > 0
    ]
