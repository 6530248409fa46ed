"""One range of a source as an immutable file: each row's texts, token ids and digests, or why it is left out.

What depends on other rows, whether one was read before and where it stands among all, is decided when parts are put together.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.digests import json_sha256
from pipeline.artifacts.schemas import PAIRS, RESPONSES
from pipeline.artifacts.tables import parquet_writer
from pipeline.config.experiment import DataConfig
from pipeline.config.losses import Data
from pipeline.errors import DataError, first_line
from pipeline.pairs.encoding import Encoder
from pipeline.pairs.groups import groups_of
from pipeline.pairs.kinds import Form
from pipeline.pairs.preferences import Dropped, Reading, Source
from pipeline.pairs.reading.ranges import Everything, Range
from pipeline.pairs.rows import Part
from pipeline.pairs.sources import encoded_units
from pipeline.pairs.splits import Group, digests_of, prompt_text, split_rule
from pipeline.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# rows that are written, and read again, together
BLOCK = 2048
# raised when the same rows become another part
_FORMAT = 2
_SAID = b"said"
# the place of parts below the cache
CACHED = "tokenised"
_SIDES: dict[Data, tuple[str, ...]] = {"pairs": ("chosen", "rejected"), "prompts": ()}
# settings that decide nothing in a part, or only through its form and its range
_OF_OTHERS = {"path", "eval_path", "eval_fraction", "split", "revision", "workers"}


@dataclass(frozen=True)
class Piece:
    """A range of a source's part, how its rows are read, and what a loss wants of them."""

    name: str
    digest: str
    range: Range | Everything
    form: Form
    data: DataConfig
    wanted: Data

    def key(self, tokenizer: str, positions: int | None) -> str:
        """What the part is known by: a digest of all that decides its content. `tokenizer` is one of everything it does."""
        data = self.data.model_dump(mode="json", exclude=_OF_OTHERS)
        endings = self.range.file.suffixes[-2:] if isinstance(self.range, Range) else []
        form = {"kind": self.form.kind, "form": self.form.format, "endings": endings, "refscore": __version__}
        made_by = {"format": _FORMAT, "versions": _versions(), "tokenizer": tokenizer, "positions": positions}
        made_of = {"digest": self.digest, "part": self.range.part, "wanted": self.wanted, "rule": split_rule(self.data)}
        return json_sha256(made_by | made_of | form | {"data": data})


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")}


def sides_of(wanted: Data) -> tuple[str, ...]:
    """The responses of a row, by name."""
    return _SIDES.get(wanted, ("response",))


def schema_of(wanted: Data) -> pa.Schema:
    """A part's columns: those of the table that is made of it but what only all rows together decide, and what that is decided by.

    `begins`: the first row of a group; `row_id`: the group's; `row`: its number within the range.
    """
    table = PAIRS if wanted == "pairs" else RESPONSES
    later = {"pair_id", "group_id", "split", "source", "source_row", "kind"}
    figures = [("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string()), ("begins", pa.bool_())]
    figures += [("prompt_digest", pa.binary(32)), ("row_id", pa.binary(16)), ("judge", pa.string())]
    figures += [("cut_off", pa.int8()), *((f"{name}_tokens", pa.int32()) for name in ("prompt", *sides_of(wanted)))]
    kept = [field for field in table if field.name not in later and not field.name.startswith("ref_")]
    return pa.schema([*figures, *kept])


def write_part(path: Path, piece: Piece, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> None:
    """Tokenise a piece's rows. Raises DataError if they cannot be read, or are no longer those that the piece's digest names."""
    part = Part(piece.name, piece.digest, piece.range.rows, list)
    source = Source(piece.name, piece.digest, [Reading(part, piece.form)], piece.data, piece.wanted)
    encoder, schema = Encoder(piece.data, tokenizer, positions), schema_of(piece.wanted)
    units = encoded_units(source.units(), encoder.of(piece.wanted))
    rows = _rows((group for unit in units for group in groups_of(unit, piece.wanted)), piece)
    with parquet_writer(path, schema) as writer, piece.range.unchanged():
        while block := list(islice(rows, BLOCK)):
            writer.write_table(pa.Table.from_pylist(block, schema))
        said = {"read": source.read, "unread": source.unread, "control": encoder.control, "whole": encoder.whole}
        writer.add_key_value_metadata({_SAID: json.dumps(said)})


def figures_of(path: Path, wanted: Data) -> tuple[pa.Table, dict[str, Any]]:
    """All of a part that need not be read row by row: its columns without texts and token ids, and what it says of itself.

    Raises DataError if the file is damaged.
    """
    names = schema_of(wanted).names
    texts = {"topic", "prompt", "prompt_ids", *(f"{side}{what}" for side in sides_of(wanted) for what in ("", "_ids"))}
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read([name for name in names if name not in texts], use_threads=False)
            return table.combine_chunks(), json.loads((file.metadata.metadata or {})[_SAID])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> DataError:
    """What is said of a file of the cache that cannot be read."""
    return DataError(
        f"{path} is damaged ({first_line(error)}): remove {durable.CACHE / CACHED}, and run the same command again"
    )


def _rows(groups: Iterable[Group | Dropped], piece: Piece) -> Iterator[dict[str, Any]]:
    """The rows of a part, under their columns' names."""
    wanted, rule = piece.wanted, split_rule(piece.data)
    sides = sides_of(wanted)
    for group in groups:
        if isinstance(group, Dropped):
            yield {"row": group.row, "reason": group.reason, "detail": group.detail, "begins": True}
            continue
        prompt_digest, row_id = digests_of(group, wanted, rule)
        for number, one in enumerate(group):
            said = one.preference
            row = {
                "row": said.row,
                "begins": not number,
                "prompt_digest": prompt_digest,
                "row_id": row_id,
                "judge": said.judge,
                "cut_off": len(said.cut_off),
                "prompt_tokens": len(one.prompt_ids),
                "topic": said.topic,
                "prompt": prompt_text(said.prompt),
                "prompt_ids": one.prompt_ids,
                "margin": said.margin,
                "label": said.label,
                "score": said.score,
            }
            for side, shown, ids in zip(sides, ("chosen", "rejected"), one.responses, strict=False):
                row |= {side: said.shown(shown), f"{side}_ids": ids, f"{side}_tokens": len(ids)}
            yield row
