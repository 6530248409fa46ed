"""Why a sequence is not in the store: which field of the reference, or which part of the row, differs from before.

The store knows keys only, by design. What a key stood for is known from the runs that used it: their pairs.parquet or
responses.parquet holds the tokens and texts, dropped.parquet what was left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts.runs import Run, existing_runs, open_run
from pipeline.artifacts.schemas import DROPPED, PAIRS, RESPONSES
from pipeline.artifacts.tables import read_about, read_table
from pipeline.config.experiment import Config
from pipeline.errors import DataError
from pipeline.precompute.plan import Plan, make_plan
from pipeline.store.store import read_reference
from pipeline.store.tidying.inventory import is_described, references

Row = dict[str, Any]
# tensors that are named one by one; another model differs in all of them
_LISTED = 3
_WORDS = {"weights": "weights of", "architecture": "config.json:", "numerics": "numerics:", "version": "key format"}


@dataclass
class Memory:
    """What earlier runs knew: pairs, responses and drops by source and row, and pairs and responses by prompt text."""

    by_row: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    by_prompt: dict[str, Row] = field(default_factory=dict)
    dropped: dict[tuple[str, int], Row] = field(default_factory=dict)


def explain(config: Config, row: int | None) -> list[str]:
    """Hit or miss of every sequence, or of those from row `row` of its source; on a miss what differs from the nearest that is
    stored. Sentences for people. Raises DataError if no pair comes from that row.
    """
    plan = make_plan(config)
    reference = plan.identity.reference_id
    source_rows = plan.pairs.source_rows()
    sides = len(plan.sides)
    positions = [at for at in range(len(plan.keys)) if row is None or source_rows[at // sides] == row]
    if not positions:
        made = "pair" if plan.pairs.of_pairs else "response"
        raise DataError(f"no {made} comes from row {row}: 'refscore validate' says what was dropped and why")
    absent = set(plan.keys.take(pa.array(plan.missing)).to_pylist())
    misses = [position for position in positions if plan.keys[position].as_py() in absent]
    said = [f"reference {reference[:12]}: {_counts(plan, positions, len(misses))}"]
    if not misses:
        return said
    if len(absent) == plan.sequences and not any(map(is_described, plan.store.places)):
        nearest = nearest_reference(plan.identity.described(), config.reference.store)
        if nearest is None:
            return [*said, "no place of the store holds a reference yet: every sequence is a miss"]
        said.append(f"no score of this reference is stored; the nearest is {nearest[0][:12]}, which differs in:")
        said += [f"  {words}" for words in nearest[1]]
        if all(words.startswith(f"{_WORDS['numerics']} engine") for words in nearest[1]):
            said.append(f"'refscore store adopt {nearest[0][:12]}' lets its scores stand for these, if a sample agrees")
        return said
    causes_of_misses = causes(plan, misses, remember([open_run(name) for name in existing_runs()]))
    for (cause,), rows in causes_of_misses.group_by("cause", maintain_order=True):
        shown = ", ".join(
            f"row {number} {side}" for number, side in rows.select("source_row", "side").head(5).iter_rows()
        )
        said.append(f"  {len(rows)} x {cause}: {shown}{' ...' if len(rows) > 5 else ''}")
    return said


def _counts(plan: Plan, positions: Sequence[int], misses: int) -> str:
    keys = plan.keys.take(pa.array(positions))
    adopted = {
        by: pc.sum(pc.is_in(keys, value_set=plan.keys.take(pa.array(held)))).as_py()
        for by, held in plan.adopted.items()
    }
    hits = len(positions) - misses - sum(adopted.values())
    from_others = "".join(f"{count} adopted from {by[:12]}, " for by, count in adopted.items())
    return f"{hits} hits, {from_others}{misses} misses"


def nearest_reference(described: Row, stores: Iterable[str]) -> tuple[str, list[str]] | None:
    """The id of the reference in the stores that differs least from `described`, and the differences in words."""
    candidates = []
    for store in stores:
        with suppress(DataError):  # the first of a list need not be there yet
            for reference_id, place in references(store).items():
                with suppress(DataError):
                    candidates.append((reference_id, differences(read_reference(place), described)))
    return min(candidates, key=lambda item: (len(item[1]), item[0]), default=None)


def differences(stored: Row, requested: Row) -> list[str]:
    """Every field in which two described references differ, in words: stored value -> requested value."""
    words = []
    for section in sorted(stored.keys() | requested.keys()):
        before, after = stored.get(section, {}), requested.get(section, {})
        if not isinstance(before, dict) or not isinstance(after, dict):
            if before != after:
                words.append(f"{_WORDS.get(section, section)} {before!r} -> {after!r}")
            continue
        differing = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        counted = ""
        if section in ("weights", "adapter") and len(differing) > _LISTED:
            counted, differing = f"{len(differing)} tensors, first ", differing[:1]
        for name in differing:
            was, now = (_short(value.get(name)) for value in (before, after))
            words.append(f"{_WORDS.get(section, section)} {counted}{name} {was} -> {now}")
    return words


def remember(runs: Sequence[Run]) -> Memory:
    """Read what earlier runs held; unreadable artifacts are passed over."""
    memory = Memory()
    for run in runs:
        table, schema, sides = run.pairs, PAIRS, ["chosen", "rejected"]
        if run.responses.is_file():
            table, schema, sides = run.responses, RESPONSES, ["response"]
        about = read_about(table)
        columns = ["source", "source_row", "prompt", *sides, "prompt_ids", *(f"{side}_ids" for side in sides)]
        try:
            rows, dropped = read_table(table, schema, columns), read_table(run.dropped, DROPPED)
        except DataError:
            continue
        for row in rows.to_pylist():
            row |= {"run": run.name, "about": about, "sides": sides}
            memory.by_row.setdefault((row["source"], row["source_row"]), []).append(row)
            memory.by_prompt.setdefault(row["prompt"], row)
        for row in dropped.to_pylist():
            memory.dropped.setdefault((row["source"], row["source_row"]), row | {"run": run.name})
    return memory


def explain_miss(plan: Plan, position: int, memory: Memory) -> str:
    """Why the sequence at `position` of the plan's keys is not in the store, in words."""
    now, side = _at(plan, position)
    place = (now["source"], now["source_row"])
    candidates = memory.by_row.get(place, [])
    if not candidates and place in memory.dropped:
        before = memory.dropped[place]
        return f"run {before['run']} dropped the row as {before['reason']} ({before['detail']})"
    near = memory.by_prompt.get(now["prompt"])
    candidates = candidates or ([near] if near else [])
    if not candidates:
        return "no run holds a row with this prompt: it is new"
    # the candidate that differs in least
    return min(
        (_differences(plan, now, side, before, other) for before in candidates for other in _sides_like(before, side)),
        key=len,
    )[0]


def _at(plan: Plan, position: int) -> tuple[Row, str]:
    """The row at a position of the plan's keys, and the name of its side."""
    number, side = divmod(position, len(plan.sides))
    return plan.row(number), plan.sides[side]


def _sides_like(before: Row, side: str) -> list[str]:
    """The sides of an earlier row to compare with: the same, or all of another kind of data."""
    return [side] if side in before["sides"] else before["sides"]


def _differences(plan: Plan, now: Row, side: str, before: Row, other: str) -> list[str]:
    """What differs between a response and the one that stands in an earlier row as `other`."""
    words = []
    if before["prompt_ids"] != now["prompt_ids"]:
        words.append(_prompt_difference(plan, now, before))
    if before[f"{other}_ids"] != now[f"{side}_ids"]:
        words.append(_response_difference(now, side, before, other))
    if not words:
        if before["about"].get("reference_id") != plan.identity.reference_id:
            return [f"run {before['run']} scored these very tokens, for another reference"]
        return [f"run {before['run']} used its score; the shard that held it is gone or was set aside"]
    return [" and ".join(words), *words[1:]]


def _prompt_difference(plan: Plan, now: Row, before: Row) -> str:
    if before["prompt"] != now["prompt"]:
        if _without_system(before["prompt"]) == _without_system(now["prompt"]):
            return f"the system prompt differs from run {before['run']}'s"
        return f"the prompt's text differs from run {before['run']}'s"
    if before["about"].get("template") != plan.template:
        return f"the chat template was edited since run {before['run']}"
    if before["about"].get("vocabulary") != plan.vocabulary:
        return f"the tokenizer's vocabulary is not run {before['run']}'s"
    return f"the prompt's tokens differ from run {before['run']}'s (data.template?)"


def _response_difference(now: Row, side: str, before: Row, other: str) -> str:
    which = "response" if side == "response" else f"{side} response"
    if before[other] != now[side]:
        return f"the {which} was edited since run {before['run']}"
    was, is_now = before[f"{other}_ids"], now[f"{side}_ids"]
    shorter, longer = sorted((was, is_now), key=len)
    if longer[: len(shorter)] == shorter:
        return f"the {which} is cut at {len(is_now)} tokens, in run {before['run']} at {len(was)} (data.max_length)"
    return f"the {which}'s tokens differ from run {before['run']}'s though its text is the same (tokenizer, template)"


def _without_system(prompt: str) -> str:
    if prompt.startswith("system: "):
        prompt = prompt.partition("\n\n")[2]
    return prompt.removeprefix("user: ")


def _short(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "absent" if value is None else repr(value)


def causes(plan: Plan, positions: Sequence[int], memory: Memory) -> pl.DataFrame:
    """One row for each of `positions`: source, source_row, side and cause."""
    rows = []
    for position in positions:
        now, side = _at(plan, position)
        rows.append((now["source"], now["source_row"], side, explain_miss(plan, position, memory)))
    return pl.DataFrame(rows, schema=["source", "source_row", "side", "cause"], orient="row")
