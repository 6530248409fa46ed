"""`refscore validate DATA...`: what preference data holds, and every problem with its row, without a model."""

from __future__ import annotations

import shutil

from pipeline.config.experiment import Config, DataConfig
from pipeline.config.files import load_overrides
from pipeline.config.training import PolicyConfig
from pipeline.errors import DataError
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from pipeline.pairs.preferences import Dropped, Preference, open_source
from pipeline.pairs.rows import must_read_all
from pipeline.pairs.splits import build_pairs, count_reasons, listed
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
    for name in config.data.path:
        _source(name, config.data)


def _source(name: str, data: DataConfig) -> None:
    source = open_source(name, data)
    pairs = 0
    turns: dict[int, int] = {}
    reasons: dict[str, int] = {}
    first: list[Dropped] = []
    for item in source.preferences():
        if isinstance(item, Preference):
            pairs += 1
            turns[len(item.prompt)] = turns.get(len(item.prompt), 0) + 1
        else:
            reasons[item.reason] = reasons.get(item.reason, 0) + 1
            if len(first) < _SHOWN:
                first.append(item)
    console.say(f"{name}: {source.format}")
    console.say(f"{source.read} rows, {pairs} usable, {sum(reasons.values())} dropped")
    console.say(
        "messages in the prompt: " + (", ".join(f"{n} ({count} rows)" for n, count in sorted(turns.items())) or "none")
    )
    _unread(source.unread)
    _problems(first, reasons, [name])
    if not pairs:
        raise DataError(f"{name}: no row is usable")


def _tokenised(config: Config, model: str) -> None:
    spec = PolicyConfig(model=model)
    pairs = build_pairs(_without_split(config.data), load_tokenizer(locate(spec), spec))
    for name, format_name in pairs.formats.items():
        console.say(f"{name}: {format_name}")
    console.say(
        f"{len(pairs.pairs) + len(pairs.dropped)} rows, {len(pairs.pairs)} usable, {len(pairs.dropped)} dropped"
    )
    for token, count in pairs.control.items():
        console.say(f"{token} in the text of {count} rows, {_CONTROL[config.data.special_tokens]}")
    lengths = {
        "prompt": sorted(len(pair.prompt_ids) for pair in pairs.pairs),
        "chosen": sorted(len(pair.chosen_ids) for pair in pairs.pairs),
        "rejected": sorted(len(pair.rejected_ids) for pair in pairs.pairs),
    }
    rows = [[name, str(v[0]), str(v[len(v) // 2]), str(v[-1])] for name, v in lengths.items()]
    console.table("tokens", ["part", "least", "median", "most"], rows)
    _problems(pairs.dropped[:_SHOWN], count_reasons(pairs.dropped), config.data.path)


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
