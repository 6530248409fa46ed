"""Parts of a table, made in as many processes as are asked for, and kept for the next plan of the same data.

A part is in the directory of the table that is made of it and, under the same bytes, in a cache bounded by bytes: whichever is
removed first, the other stays. Beside it lies one file of keys for each reference.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import multiprocessing
import multiprocessing.process
import os
import secrets
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import strftime
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.shelf import Shelf
from pipeline.artifacts.tables import parquet_writer
from pipeline.errors import RefscoreError
from pipeline.hardware import return_freed_memory
from pipeline.models.load import chat_template_digest
from pipeline.pairs.reading.ranges import Range
from pipeline.pairs.tokenised.part import CACHED, Piece, sides_of, write_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# what a chat template calls to write the day
DAY = "strftime_now"
_KEY = pa.schema([("key", pa.binary(32))])
KeysOf = Callable[[pa.Table], pa.FixedSizeBinaryArray]


@dataclass(frozen=True)
class How:
    """How rows become token ids and keys, in whatever process: `tokenizer` loads it, `reference_id` names what `keys` gives."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    positions: int | None
    reference_id: str
    keys: KeysOf


@dataclass(frozen=True)
class Made:
    """A piece and its files; prompts alone have no keys."""

    piece: Piece
    part: Path
    keys: Path | None


class Maker:
    """Makes the parts of a table in `directory`, with a tokenizer that was loaded by this process."""

    def __init__(self, how: How, tokenizer: PreTrainedTokenizerBase, directory: Path, workers: int) -> None:
        self._how, self._tokenizer, self._directory, self._workers = how, tokenizer, directory, workers
        self._digest = tokenizer_digest(tokenizer)
        self._shelf = Shelf(durable.CACHE / CACHED)
        self._pool: ProcessPoolExecutor | None = None

    def parts(self, pieces: Iterable[Piece]) -> Iterator[Made]:
        """The part of each piece, in order; some pieces ahead are begun meanwhile.

        Raises DataError for rows that cannot be read, RefscoreError if a process is killed.
        """
        begun: deque[tuple[Made, Future[None] | None]] = deque()
        with ExitStack() as stack:
            stack.callback(self._stop)
            for piece in pieces:
                begun.append(self._begin(piece))
                # what a piece is may depend on those before it
                if len(begun) > (0 if piece.data.max_rows else 2 * (self._workers - 1)):
                    yield self._ended(*begun.popleft())
            while begun:
                yield self._ended(*begun.popleft())

    def _begin(self, piece: Piece) -> tuple[Made, Future[None] | None]:
        name = piece.key(self._digest or secrets.token_hex(8), self._how.positions)
        made = Made(piece, self._directory / f"{name}.parquet", None)
        if sides_of(piece.wanted):
            made = Made(piece, made.part, self._directory / f"{name}.{self._how.reference_id}.keys")
        kept = [self._is_kept(path) for path in (made.part, made.keys) if path]
        if all(kept):
            return made, None
        if self._workers == 1 or not isinstance(piece.range, Range):
            with _one_processor():
                _make(made, self._how, self._tokenizer)
            return_freed_memory()
            self._keep(made)
            return made, None
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _begin_process, (self._how,))
        with _without_main(), _explaining_killed():
            return made, self._pool.submit(_make_here, made)

    def _ended(self, made: Made, future: Future[None] | None) -> Made:
        if future:
            with _explaining_killed():
                future.result()
            self._keep(made)
        return made

    def _is_kept(self, path: Path) -> bool:
        """Whether the file is here, or was kept by an earlier table and is here now."""
        if not path.exists():
            with self._shelf.using(path.name) as kept:
                if kept is None:
                    return False
                try:
                    pq.read_metadata(kept)
                    with _whole_or_absent(path) as unfinished:
                        _same_file(kept, unfinished)
                except (pa.ArrowException, OSError) as error:
                    log.debug("%s cannot be used (%s)", kept, error)
                    return False
        return True

    def _keep(self, made: Made) -> None:
        """Let later tables have a piece's files, if they can know them again."""
        for path in filter(None, [made.part, made.keys] if self._digest else []):
            # only a memory: a place that cannot be written costs time
            with suppress(RefscoreError, OSError):
                self._shelf.put(path.name, partial(_same_file, path))

    def _stop(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 (hex) of all that decides which token ids texts become; None if not all of it can be seen, as it is a program."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    settings = [type(tokenizer).__name__, chat_template_digest(tokenizer), tokenizer.split_special_tokens]
    # a template that writes the day into prompts makes other ones tomorrow
    settings += [strftime("%F")] if DAY in str(tokenizer.chat_template) else []
    settings += [tokenizer.special_tokens_map, getattr(tokenizer, "add_bos_token", None)]
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}{settings}".encode()).hexdigest()


def _make(made: Made, how: How, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make what is not there of a piece's files."""
    if not made.part.exists():
        with _whole_or_absent(made.part) as path, _rarely_collected():
            write_part(path, made.piece, tokenizer, how.positions)
    if made.keys and not made.keys.exists():
        with _whole_or_absent(made.keys) as path:
            _write_keys(path, made.part, how.keys)


@contextmanager
def _whole_or_absent(path: Path) -> Iterator[Path]:
    """A path to write; on a clean exit it takes `path`'s place. It goes with this process, so that nothing is flushed."""
    unfinished = durable.temporary_beside(path)
    yield unfinished
    unfinished.rename(path)


def _write_keys(path: Path, part: Path, keys: KeysOf) -> None:
    with pq.ParquetFile(part, page_checksum_verification=True) as file, parquet_writer(path, _KEY) as writer:
        names = [name for name in file.schema_arrow.names if name.endswith("_ids")]
        for group in range(file.num_row_groups):
            writer.write_table(pa.table([keys(file.read_row_group(group, names))], schema=_KEY))


def _same_file(one: Path, other: Path) -> None:
    """Give a file a second name; on another file system, a copy of it."""
    try:
        os.link(one, other)
    except OSError:
        shutil.copyfile(one, other)


@contextmanager
def _one_processor() -> Iterator[None]:
    """Let tokenizers use one processor, as each of many processes does."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Let Python look for cycles less often: lists of token ids are many and hold none; the looks took a twentieth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _explaining_killed() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise RefscoreError(
            "a process that tokenises was killed, for want of memory perhaps: run the same command again, with fewer "
            "(--set data.workers=1)"
        ) from None


@contextmanager
def _without_main() -> Iterator[None]:
    """Let processes start without the script that this one runs, which need not be made to be imported."""
    main = sys.modules["__main__"]
    hidden: dict[str, object] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


_in_this_process: list[How] = []


def _begin_process(how: How) -> None:
    # whoever stops the command stops its processes, silently; one that is killed cannot, so they look for themselves
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _in_this_process.append(how)


def _end_with(other: multiprocessing.process.BaseProcess) -> None:
    other.join()
    os._exit(1)


@cache
def _tokenizer_here() -> PreTrainedTokenizerBase:
    # not at the beginning of the process, whose errors nobody would hear
    return _in_this_process[0].tokenizer()


def _make_here(made: Made) -> None:
    _make(made, _in_this_process[0], _tokenizer_here())
