"""What preference data and a model are, as far as a configuration depends on it: lengths, prompts, forms, positions.

Reads the data once, with the model's tokenizer; loads no weights and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.experiment import DataConfig
from pipeline.config.training import PolicyConfig
from pipeline.errors import ConfigError, DataError
from pipeline.models.configuration import position_limit
from pipeline.models.load import load_tokenizer
from pipeline.models.locate import locate
from pipeline.pairs.preferences import Dropped, Preference, open_source
from pipeline.pairs.reading.spool import is_spooled
from pipeline.pairs.rows import open_rows
from pipeline.pairs.splits import Pair, PairStream, prompt_id_of, prompt_text
from pipeline.pairs.table import DropCount

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# pairs whose texts are looked at, for judges and the template
_LOOKED_AT = 500
# so many responses must begin with white space for the texts to be continuations
_CONTINUE = 0.8
# names that columns have elsewhere; they are taken if the rows have one of each
_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "user", "context"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "preferred", "good", "better", "winner", "accepted"),
    "rejected": ("rejected", "rejected_response", "response_rejected", "dispreferred", "bad", "worse", "loser"),
}


@dataclass
class Survey:
    """What was found. Arrays have an entry per pair: lengths in tokens, and where in [0, 1) the split rule puts its prompt.

    `template`: chat, or none where the tokenizer has no chat template or the responses go on from the prompt's text.
    """

    data: list[str]
    model: str
    base: Path
    positions: int | None
    has_template: bool
    template: str
    columns: dict[str, str] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    drops: dict[str, DropCount] = field(default_factory=dict)
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    responses: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64), repr=False)
    places: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    looked_at: list[Preference] = field(default_factory=list, repr=False)

    @property
    def dropped(self) -> int:
        """Rows that are no pair."""
        return sum(drop.count for drop in self.drops.values())

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer sequence of each pair, prompt included."""
        lengths: np.ndarray = self.prompts + self.responses.max(1)
        return lengths

    @property
    def trees(self) -> np.ndarray:
        """Tokens of each pair as a tree, without the last of each response."""
        trees: np.ndarray = self.prompts + self.responses.sum(1) - 2
        return trees

    @property
    def continues(self) -> float:
        """Share of the pairs that were looked at whose prompt is one text and whose responses begin with white space."""
        found = [
            len(item.prompt) == 1 and item.chosen[:1].isspace() and item.rejected[:1].isspace()
            for item in self.looked_at
        ]
        return sum(found) / len(found) if found else 0.0

    def texts(self) -> list[tuple[str, str, str]]:
        """Prompt, chosen and rejected of the pairs that were looked at, for people and judges."""
        return [(prompt_text(item.prompt), item.shown("chosen"), item.shown("rejected")) for item in self.looked_at]


def survey(data: list[str], model: str) -> Survey:
    """Read `data` as it would be for `model`, pairs of any length that the model reads.

    Raises DataError if nothing of it is a pair (with the reasons), ConfigError if the model or its tokenizer cannot be used, or
    if the data can be read but once.
    """
    if once := [name for name in data if is_spooled(name)]:
        raise ConfigError(f"{once[0]} can be read once, and every stage reads the data again: save it as a file first")
    columns = _columns_of(data)
    spec = PolicyConfig(model=model)
    base = locate(spec)
    tokenizer = load_tokenizer(base, spec)
    found = Survey(data, model, base, position_limit(base), bool(tokenizer.chat_template), "chat", columns)
    if found.has_template:
        _read(found, tokenizer)
    if not found.has_template or found.continues >= _CONTINUE:
        found = Survey(data, model, base, found.positions, found.has_template, "none", columns)
        _read(found, tokenizer)
    if not len(found.prompts):
        reasons = "; ".join(f"{drop.count} x {reason}" for reason, drop in found.drops.items())
        raise DataError(
            f"{', '.join(data)}: no row is a pair ({reasons}); 'refscore validate' shows what is wrong with each"
        )
    return found


def _read(found: Survey, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = {"path": found.data, "template": found.template, "eval_fraction": 0.0, "columns": found.columns}
    stream = PairStream(DataConfig.model_validate(settings), tokenizer, found.positions)
    _count(found, stream)
    found.formats = dict(stream.formats)


def _count(found: Survey, stream: Iterable[Pair | Dropped]) -> None:
    prompts, responses, places = [], [], []
    for item in stream:
        if isinstance(item, Dropped):
            found.drops.setdefault(item.reason, DropCount(0, item)).count += 1
            continue
        prompts.append(len(item.prompt_ids))
        responses.append((len(item.chosen_ids), len(item.rejected_ids)))
        # the first 64 bits of the prompt's digest, as the split rule reads them
        places.append(int(prompt_id_of(item.prompt_ids), 16) / 2**64)
        if len(found.looked_at) < _LOOKED_AT:
            found.looked_at.append(item.preference)
    found.prompts, found.places = np.asarray(prompts, np.int64), np.asarray(places)
    found.responses = np.asarray(responses, np.int64).reshape(-1, 2)


def _columns_of(data: list[str]) -> dict[str, str]:
    """The column map that the data needs, if its columns' names can mean one thing alone; empty if it needs none.

    Raises DataError if the data is of no known form otherwise.
    """
    config = DataConfig(path=data)
    try:
        for name in data:
            open_source(name, config)
    except DataError:
        rows, _ = open_rows(data[0], config)
        names = set[str]().union(*(row.keys() for row in islice(rows(), 20)))
        meant = {wanted: [name for name in known if name in names] for wanted, known in _NAMES.items()}
        if any(len(given) != 1 for given in meant.values()):
            raise
        return {wanted: given[0] for wanted, given in meant.items() if given[0] != wanted}
    return {}
