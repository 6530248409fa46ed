"""`refscore validate DATA...`: what preference data holds, and every problem with its row, without a model."""

from __future__ import annotations

import shutil

from pipeline.config.experiment import Config, DataConfig
from pipeline.config.files import load_overrides
from pipeline.config.losses import Data, data_of
from pipeline.config.training import PolicyConfig
from pipeline.errors import DataError
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from pipeline.pairs.groups import ResponseRow, ResponseStream
from pipeline.pairs.kinds import UNITS
from pipeline.pairs.preferences import Dropped, Preference, open_source
from pipeline.pairs.rows import must_read_all
from pipeline.pairs.sources import listed, read_for
from pipeline.pairs.splits import Pair, PairStream, count_reasons, must_train
from stages import console

_SHOWN = 20
_CONTROL = {
    "text": "encoded as text (data.special_tokens=parse: as the token)",
    "parse": "encoded as the token (data.special_tokens=text: as text)",
}


def main(data: list[str], overrides: list[str], model: str | None) -> None:
    """Report on each source of `data`. Raises DataError if one holds no row that is usable."""
    config = load_overrides({"data": {"path": data}}, overrides)
    if model is not None:
        _tokenised(config, model)
        return
    must_read_all(config.data)
    wanted: Data | None = "prompts" if read_for(config.data, data_of(config.train)) == "prompts" else None
    for name in config.data.path:
        _source(name, config.data, wanted)


def _source(name: str, data: DataConfig, wanted: Data | None) -> None:
    """`wanted` None: as what it is, whatever loss may learn from it."""
    source = open_source(name, data, wanted)
    usable = 0
    turns: dict[int, int] = {}
    responses: dict[str, int] = {}
    reasons: dict[str, int] = {}
    first: list[Dropped] = []
    for unit in source.units():
        kept = [item for item in unit if isinstance(item, Preference)]
        if kept:
            usable += 1
            turns[len(kept[0].prompt)] = turns.get(len(kept[0].prompt), 0) + 1
        for item in kept:
            said = "" if not item.single else "in a list" if item.label is None else "good" if item.label else "bad"
            responses[said] = responses.get(said, 0) + 1
        for row in (item for item in unit if isinstance(item, Dropped)):
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
            if len(first) < _SHOWN:
                first.append(row)
    console.say(f"{name}: {source.format}")
    partly = usable + sum(reasons.values()) - source.read
    beside = f", {partly} of these responses of rows that are used" if partly else ""
    console.say(f"{source.read} rows, {usable} usable, {sum(reasons.values())} dropped{beside}")
    if single := {said: count for said, count in sorted(responses.items(), reverse=True) if said}:
        console.say("responses: " + ", ".join(f"{count} {said}" for said, count in single.items()))
    if "prompts" in (wanted, *source.kinds):
        console.say("prompts alone, of which train.objective=policy_gradient makes samples: 'refscore rollout'")
    console.say(
        "messages in the prompt: " + (", ".join(f"{n} ({count} rows)" for n, count in sorted(turns.items())) or "none")
    )
    _unread(source.unread)
    _problems(first, reasons, [name])
    if not usable:
        raise DataError(f"{name}: no row is usable")


def _tokenised(config: Config, model: str) -> None:
    spec = PolicyConfig(model=model)
    data, tokenizer = _without_split(config.data), load_tokenizer(locate(spec), spec)
    wanted = read_for(data, data_of(config.train))
    kinds = set().union(*(open_source(name, data, None).kinds for name in data.path)) if wanted == "pairs" else set()
    if kinds & {"unpaired", "prompts"}:
        wanted = "prompts" if "prompts" in kinds else "responses"
    stream = PairStream(data, tokenizer) if wanted == "pairs" else ResponseStream(data, tokenizer, wanted=wanted)
    lengths: dict[str, list[int]] = {}
    dropped: list[Dropped] = []
    usable = 0
    for item in stream:
        if isinstance(item, Dropped):
            dropped.append(item)
            continue
        usable += 1
        ids = {"chosen": item.chosen_ids, "rejected": item.rejected_ids} if isinstance(item, Pair) else {}
        ids = {"response": item.response_ids} if isinstance(item, ResponseRow) and item.response_ids else ids
        for part, of_part in {"prompt": item.prompt_ids, **ids}.items():
            lengths.setdefault(part, []).append(len(of_part))
    must_train(usable, data, count_reasons(dropped), UNITS[wanted][:-1])
    for name, format_name in stream.formats.items():
        console.say(f"{name}: {format_name}")
    made = "usable" if stream.given == sum(stream.read.values()) else f"{UNITS[wanted]} usable"
    console.say(f"{sum(stream.read.values())} rows, {usable} {made}, {len(dropped)} dropped")
    for token, count in stream.control.items():
        console.say(f"{token} in the text of {count} rows, {_CONTROL[config.data.special_tokens]}")
    rows = [[part, str(min(v)), str(sorted(v)[len(v) // 2]), str(max(v))] for part, v in lengths.items()]
    console.table("tokens", ["part", "least", "median", "most"], rows)
    _problems(dropped[:_SHOWN], count_reasons(dropped), config.data.path)


def _without_split(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"eval_fraction": 0.0, "eval_path": None})


def _unread(columns: list[str]) -> None:
    if columns:
        console.say(f"nothing reads {listed(columns)}")


def _problems(first: list[Dropped], reasons: dict[str, int], sources: list[str]) -> None:
    """How many rows each reason dropped, and the first rows with what was seen."""
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.say(f"dropped {count} x {reason}")
    width = shutil.get_terminal_size().columns
    for row in first:
        where = f"row {row.row}" if [row.source] == sources else f"{row.source} row {row.row}"
        console.say(f"  {where}: {row.reason}{f' ({row.detail})' if row.detail else ''}"[: max(60, width)])
    left = sum(reasons.values()) - len(first)
    if left:
        console.say(f"  ... and {left} more; precompute lists all of them in dropped.parquet")
