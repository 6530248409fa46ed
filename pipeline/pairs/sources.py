"""All sources of an experiment, one after the other: what each row becomes, together, and whether every row became something."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice

from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import ConfigError
from pipeline.pairs.encoding import Encoded
from pipeline.pairs.preferences import Dropped, Preference, Source, must_balance, open_source
from pipeline.pairs.rows import must_read_all

log = logging.getLogger(__name__)

Items = Iterable[Preference | Dropped]
Encode = Callable[[Items], Iterator[Encoded | Dropped]]


class Sources:
    """Every row of every source of `data` as it is read, for a loss that learns from `wanted`.

    `formats` and `digests` of a source are known once it is opened, `read` and `unread` once its rows have ended.
    """

    def __init__(self, data: DataConfig, wanted: Data) -> None:
        must_read_all(data)
        self._data, self._wanted = data, wanted
        self.formats: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.read: dict[str, int] = {}
        self.unread: dict[str, list[str]] = {}

    @cached_property
    def opened(self) -> list[tuple[str, Source]]:
        """Each source with what it is for: "eval" or "train". Raises DataError if one cannot be read."""
        data = self._data
        # held-out data first, so that its prompts are known when the training data is read
        names = [*([(data.eval_path, "eval")] if data.eval_path else []), *((path, "train") for path in data.path)]
        opened = [(role, open_source(name, data, self._wanted)) for name, role in names]
        for _, source in opened:
            self.formats[source.name], self.digests[source.name] = source.format, source.digest
        return opened

    def units(self, encode: Encode) -> Iterator[tuple[str, list[Encoded | Dropped]]]:
        """What each row became, encoded, with what its source is for.

        Raises DataError if a source cannot be read, CheckError if rows were lost on the way, ConfigError for a setting that
        nothing has read.
        """
        given = 0
        for role, source in self.opened:
            for unit in encoded_units(source.units(), encode):
                given += 1
                yield role, unit
        self.end(given)

    def end(self, given: int) -> None:
        """Say that all was read, and that of its rows `given` became something. Raises as `units` does."""
        for _, source in self.opened:
            self.read[source.name] = self.read.get(source.name, 0) + source.read
            self.unread[source.name] = source.unread
        must_balance(", ".join(self.read), sum(self.read.values()), given)
        ranked = any("ranked" in source.kinds for _, source in self.opened)
        said = {"lists": "the loss learns from whole lists", "prompts": "the training learns from prompts alone"}
        if self._data.lists != DataConfig.model_fields["lists"].default and not (ranked and self._wanted == "pairs"):
            raise ConfigError(
                f"data.lists={self._data.lists} says which pairs a ranked list makes, and "
                + (said.get(self._wanted, "") if ranked else "data.path names no ranked lists")
                + ": remove it"
            )
        for name, columns in self.unread.items():
            if columns:
                log.warning("%s: nothing reads %s", name, listed(columns))


def read_for(data: DataConfig, wanted: Data) -> Data:
    """What `data` is read for by a training that wants `wanted`: prompts come as pairs, if all of it makes pairs, so that stage
    three has held-out pairs as well.
    """
    if wanted != "prompts":
        return wanted
    names = [*data.path, *filter(None, [data.eval_path])]
    kinds = set().union(*(open_source(name, data, "prompts").kinds for name in names))
    return "pairs" if kinds <= {"pairs", "ranked"} else "prompts"


def listed(columns: list[str]) -> str:
    """Columns for people: the first ten, and how many more."""
    more = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
    return f"the column{'s' if len(columns) > 1 else ''} {', '.join(columns[:10])}{more}"


def encoded_units(units: Iterable[list[Preference | Dropped]], encode: Encode) -> Iterator[list[Encoded | Dropped]]:
    """Each unit, all of whose items went through `encode`, which works on many of them at a time."""
    sizes: deque[int] = deque()

    def items() -> Iterator[Preference | Dropped]:
        for unit in units:
            sizes.append(len(unit))
            yield from unit

    encoded = encode(items())
    for first in encoded:
        yield [first, *islice(encoded, sizes.popleft() - 1)]
