"""`refscore validate DATA`: what preference data holds, and every problem with its row, without a model."""

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
from pipeline.pairs.splits import build_pairs, count_reasons
from stages import console

_SHOWN = 20


def main(data: str, overrides: list[str], model: str | None) -> None:
    """Report on `data`. Raises DataError if no row is usable."""
    config = load_overrides({"data": {"path": data}}, overrides)
    if model is not None:
        _tokenised(config, model)
        return
    must_read_all(config.data)
    source = open_source(data, config.data)
    pairs = 0
    turns: dict[int, int] = {}
    dropped: list[Dropped] = []
    for item in source.preferences():
        if isinstance(item, Preference):
            pairs += 1
            turns[len(item.prompt)] = turns.get(len(item.prompt), 0) + 1
        else:
            dropped.append(item)
    console.say(f"{data}: {source.format}")
    console.say(f"{pairs + len(dropped)} rows, {pairs} usable, {len(dropped)} dropped")
    console.say(
        "messages in the prompt: " + (", ".join(f"{n} ({count} rows)" for n, count in sorted(turns.items())) or "none")
    )
    _problems(dropped)
    if not pairs:
        raise DataError(f"{data}: no row is usable")


def _tokenised(config: Config, model: str) -> None:
    spec = PolicyConfig(model=model)
    pairs = build_pairs(_without_split(config.data), load_tokenizer(locate(spec), spec))
    for name, format_name in pairs.formats.items():
        console.say(f"{name}: {format_name}")
    console.say(
        f"{len(pairs.pairs) + len(pairs.dropped)} rows, {len(pairs.pairs)} usable, {len(pairs.dropped)} dropped"
    )
    lengths = {
        "prompt": sorted(len(pair.prompt_ids) for pair in pairs.pairs),
        "chosen": sorted(len(pair.chosen_ids) for pair in pairs.pairs),
        "rejected": sorted(len(pair.rejected_ids) for pair in pairs.pairs),
    }
    rows = [[name, str(v[0]), str(v[len(v) // 2]), str(v[-1])] for name, v in lengths.items()]
    console.table("tokens", ["part", "least", "median", "most"], rows)
    _problems(pairs.dropped)


def _without_split(data: DataConfig) -> DataConfig:
    return data.model_copy(update={"eval_fraction": 0.0, "eval_path": None})


def _problems(dropped: list[Dropped]) -> None:
    for reason, count in count_reasons(dropped).items():
        console.say(f"dropped {count} x {reason}")
    width = shutil.get_terminal_size().columns
    for row in dropped[:_SHOWN]:
        console.say(f"  row {row.row}: {row.reason}{f' ({row.detail})' if row.detail else ''}"[: max(60, width)])
    if len(dropped) > _SHOWN:
        console.say(f"  ... and {len(dropped) - _SHOWN} more; precompute lists all of them in dropped.parquet")
