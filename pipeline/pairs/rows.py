"""Rows of preference data, from JSONL, JSON and Parquet files, folders and Hub data sets.

A file that cannot be read is an error with file, line and column. What a row means is `pipeline.pairs.formats`' concern.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError, first_line

Row = dict[str, Any]

_EMBEDDED = "embedded:"


def open_rows(name: str, data: DataConfig) -> tuple[Callable[[], Iterator[Row]], str]:
    """A function that reads a source's rows from the start, and a digest of its bytes. Raises DataError."""
    path = local_path(name)
    if path.is_file():
        readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{name}: files ending in {', '.join(readers)} are read, got {path.suffix!r}")
        return lambda: reader(path), _file_digest(path)
    if path.is_dir():
        return _data_set(str(path), data.split, None)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".jsonl", ".json", ".parquet"):
        return _data_set(name, data.split, data.revision)
    raise DataError(f"{name}: no such file or folder, and not of a Hub data set's form owner/name")


def local_path(name: str) -> Path:
    """Where a source lies if it is a file or a folder: `embedded:<file>` is one that comes with refscore.

    Raises DataError for an embedded file that there is not.
    """
    if not name.startswith(_EMBEDDED):
        return Path(name).expanduser()
    package = Path(__file__).parent.parent
    # in an installed package, and in a checkout
    places = (package / "presets", package.parent / "data")
    paths = [place / name.removeprefix(_EMBEDDED) for place in places]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(
        f"{name}: no such file comes with refscore; there are train.jsonl and eval.jsonl in embedded:demo/ and embedded:bad_rule/"
    )


def must_read_all(data: DataConfig) -> None:
    """Raise ConfigError if a field says how to read a kind of source that `data` has none of."""
    sources = [local_path(name) for name in [*data.path, *filter(None, [data.eval_path])]]
    if data.revision and all(path.exists() for path in sources):
        raise ConfigError("data.revision is that of a Hub data set, and data.path names none: remove it")
    if data.split != DataConfig.model_fields["split"].default and all(path.is_file() for path in sources):
        raise ConfigError(
            f"data.split={data.split} chooses a split of a folder or Hub data set, and data.path names files only: remove it, "
            "or give the folder"
        )


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            yield _must_be_object(_decode(path, line, number), f"{path}, line {number}")


def _decode(path: Path, line: bytes, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        line_number = number + error.lineno - 1
        raise DataError(f"{path}, line {line_number}, column {error.colno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, byte {error.start + 1}: not valid UTF-8") from None
    except RecursionError:
        raise DataError(f"{path}, line {number}: nested too deeply") from None


def _json(path: Path) -> Iterator[Row]:
    content = _decode(path, path.read_bytes(), 1)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(f"{path}: a JSON file must hold a list of rows, got {type(content).__name__}")
    for number, row in enumerate(content):
        yield _must_be_object(row, f"{path}, row {number}")


def _must_be_object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # asked for all row groups at once, pyarrow keeps the bytes of those it has read
            batches = (batch for group in range(file.num_row_groups) for batch in file.iter_batches(1024, [group]))
            for batch in batches:
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _data_set(name: str, split: str, revision: str | None) -> tuple[Callable[[], Iterator[Row]], str]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=split, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        # datasets reports a Hub that cannot be reached as a missing file or a connection error
        raise DataError(
            f"{name}: the data set cannot be loaded ({first_line(error)}). Without a network give data.path a local file "
            "or folder; with one, check the name, your rights (HF_TOKEN) and HF_HUB_OFFLINE"
        ) from None
    except ValueError as error:
        raise DataError(f"{name}: {first_line(error)} (data.split is {split!r})") from None
    return lambda: iter(table), hashlib.sha256(table._fingerprint.encode()).hexdigest()  # noqa: SLF001  # no public name


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest(name: str) -> str | None:
    """sha256 of a local file's bytes; None for folders and Hub data sets, whose digest needs loading them."""
    path = local_path(name)
    return _file_digest(path) if path.is_file() and os.access(path, os.R_OK) else None
