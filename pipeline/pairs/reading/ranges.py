"""Ranges of a file that are read each by itself, so that several processes read one file: bytes of JSONL, row groups of Parquet.

What cannot be read from its middle (a list in JSON, CSV, whatever is compressed) is one range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

from pipeline.pairs.reading.content import Content
from pipeline.pairs.reading.files import file_rows
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.reading.remote import File, RemoteFile

# about as much as ten thousand pairs, which take a process some seconds
RANGE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Range:
    """A range of a file of `content`, which messages call `place`: `part` as `file_rows` takes it, or all of the file. `bytes`: its
    size.
    """

    file: File
    place: File
    content: Content
    bytes: int
    part: tuple[int, int] | None = None

    def rows(self) -> Iterator[Row]:
        """Its rows. Raises DataError for whatever is broken in it."""
        return file_rows(self.file, self.place, self.part)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise DataError at the end, whatever else was met, if the file holds something else than it did."""
        try:
            yield
        finally:
            self.content.must_be_held(self.file, self.place)


@dataclass(frozen=True)
class Everything:
    """All rows of a source that is no file, which this process alone can read."""

    rows: Callable[[], Iterator[Row]] = field(repr=False)
    bytes: int = 0
    part: None = None

    def unchanged(self) -> AbstractContextManager[None]:
        """It is read from a copy that nobody changes."""
        return nullcontext()


def ranges_of(file: File, place: File, content: Content) -> list[Range]:
    """The ranges of a file, in order."""
    size = file.size if isinstance(file, RemoteFile) else file.stat().st_size if file.is_file() else 0
    cuts = {".jsonl": _of_lines, ".ndjson": _of_lines, ".parquet": _of_groups}.get(file.suffix.lower())
    edges = cuts(file, size) if cuts and size > RANGE_BYTES else []
    if len(edges) < 3:
        return [Range(file, place, content, size)]
    share = size / edges[-1]
    return [Range(file, place, content, int((end - begin) * share), (begin, end)) for begin, end in pairwise(edges)]


def _of_lines(_: File, size: int) -> list[int]:
    count = -(-size // RANGE_BYTES)
    return [size * number // count for number in range(count + 1)]


def _of_groups(file: File, _: int) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as opened:
            metadata = pq.read_metadata(opened)
    except (pa.ArrowException, OSError):
        return []  # whoever reads it says what is wrong
    edges, filled = [0], 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= RANGE_BYTES:
            edges.append(group + 1)
            filled = 0
    return edges if edges[-1] == metadata.num_row_groups else [*edges, metadata.num_row_groups]
