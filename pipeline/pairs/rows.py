"""What a name in the configuration leads to: files, a pattern of files, a folder, here or at a URL, standard input, a data set of
the Hub.

A source is one or more parts, each read by itself. Its digest is that of all their bytes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError, first_line
from pipeline.pairs.reading.content import Content
from pipeline.pairs.reading.files import PACKED, SUFFIXES, file_rows, suffix_of
from pipeline.pairs.reading.folders import files_of, is_saved, left_to_datasets, remote_files_of
from pipeline.pairs.reading.json_rows import Row
from pipeline.pairs.reading.misnamed import STDIN as SHOWN_STDIN
from pipeline.pairs.reading.misnamed import printable
from pipeline.pairs.reading.ranges import Everything, Range, ranges_of
from pipeline.pairs.reading.remote import PATTERN, File, RemoteFile, is_url, remote_files
from pipeline.pairs.reading.spool import STDIN, is_spooled, spooled

log = logging.getLogger(__name__)

_EMBEDDED = "embedded:"


@dataclass(frozen=True)
class Part:
    """One file of a source, or all of a data set: its name for people, a digest of its content, its rows from the start, and ranges
    that hold the same rows.
    """

    name: str
    digest: str
    rows: Callable[[], Iterator[Row]] = field(repr=False)
    ranges: Callable[[], Sequence[Range | Everything]] = field(repr=False)


def open_parts(name: str, data: DataConfig) -> tuple[list[Part], str]:
    """The parts of a source, and a digest of their bytes. Raises DataError if there are none or one cannot be read."""
    if is_url(name):
        return _remote_parts(name, data.split)
    path = local_path(name)
    if is_spooled(name):
        copy = spooled(name)
        part = _part(name, copy, SHOWN_STDIN if name == STDIN else Path(name))
        return [part], part.digest
    if path.is_dir() and left_to_datasets(path, data.split):
        return _data_set(name, data.split, None, path)
    if files := _files(name, path, data.split):
        single = files == [path]
        names = [name if single else printable(str(file)) for file in files]
        parts = [_part(shown, file, file) for shown, file in zip(names, files, strict=True)]
        return parts, _digest_of(name, files, [part.digest for part in parts])
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix.lower() not in (*SUFFIXES, *PACKED):
        return _data_set(name, data.split, data.revision)
    if path.is_symlink():
        raise DataError(f"{name} is a link to {path.readlink()}, which is not there")
    if path.exists():
        raise DataError(f"{name} is no file, folder or pipe")
    raise DataError(f"{name}: no such file or folder, and not of a Hub data set's form owner/name")


def _remote_parts(name: str, split: str) -> tuple[list[Part], str]:
    files = _remote_files(name, split)
    parts = [_part(str(file), file, file) for file in files]
    return parts, _digest_of_remote(parts)


def _remote_files(name: str, split: str) -> list[RemoteFile]:
    files, folder = remote_files(name)
    if folder is not None:
        return remote_files_of(folder, files, split)
    if unknown := [str(file) for file in files if suffix_of(file) is None]:
        raise DataError(
            f"{name}: {', '.join(unknown[:5])} {'is' if len(unknown) == 1 else 'are'} not read; files ending in "
            f"{', '.join(SUFFIXES)} are, all but Parquet also behind .gz or .zst"
        )
    return files


def _digest_of_remote(parts: list[Part]) -> str:
    if len(parts) == 1:
        return parts[0].digest
    return hashlib.sha256(json.dumps([(part.name, part.digest) for part in parts]).encode()).hexdigest()


def _part(name: str, file: File, place: File) -> Part:
    content = Content.of(file)
    return Part(name, content.digest, partial(file_rows, file, place), partial(ranges_of, file, place, content))


def open_rows(name: str, data: DataConfig) -> tuple[Callable[[], Iterator[Row]], str]:
    """A function that reads a source's rows from the start, and a digest of its bytes. Raises DataError."""
    parts, digest = open_parts(name, data)
    return lambda: chain.from_iterable(part.rows() for part in parts), digest


def local_path(name: str) -> Path:
    """Where a source lies if it is a file or a folder: `embedded:<file>` is one that comes with refscore.

    Raises ConfigError for a name that is none, DataError for an embedded file that there is not.
    """
    if not name.strip():
        raise ConfigError(
            "data.path is empty: name a file, a folder, a pattern, a Hub data set, or - for standard input"
        )
    if not name.startswith(_EMBEDDED):
        try:
            path = Path(name).expanduser()
            path.exists()
            # names are written into tables and files of UTF-8
            name.encode()
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"{printable(name)[:80]}: no path that can be read ({printable(first_line(error))})"
            ) from None
        return path
    package = Path(__file__).parent.parent
    # in an installed package, and in a checkout
    places = (package / "presets", package.parent / "data")
    paths = [place / name.removeprefix(_EMBEDDED) for place in places]
    for path in paths:
        if path.is_file():
            return path
    raise DataError(
        f"{name}: no such file comes with refscore; there are train.jsonl and eval.jsonl in embedded:demo/ and embedded:bad_rule/, "
        "and confirm.jsonl in embedded:demo/"
    )


def must_read_all(data: DataConfig) -> None:
    """Raise ConfigError if a field says how to read a kind of source that `data` has none of."""
    names = [*data.path, *filter(None, [data.eval_path])]
    if data.revision and all(is_url(name) or _is_file_like(name) or local_path(name).exists() for name in names):
        raise ConfigError("data.revision is that of a Hub data set, and data.path names none: remove it")
    if data.split != DataConfig.model_fields["split"].default and all(map(_is_file_like, names)):
        raise ConfigError(
            f"data.split={data.split} chooses a split of a folder or Hub data set, and data.path names files only: remove it, "
            "or give the folder"
        )


def source_digest(name: str, split: str) -> str | None:
    """Digest of what a source holds now; None if it is not at hand or only loading would tell (standard input, the Hub)."""
    if is_url(name):
        try:
            return _remote_parts(name, split)[1]
        except (ConfigError, DataError) as error:
            log.debug("%s", error)
            return None
    path = local_path(name)
    if is_spooled(name) or (path.is_dir() and left_to_datasets(path, split)):
        return None
    files = [path] if path.is_file() else _files(name, path, split) if path.is_dir() or _matches(name, path) else []
    if not files or not all(os.access(file, os.R_OK) for file in files):
        return None
    return _digest_of(name, files, [Content.of(file).digest for file in files])


def _is_file_like(name: str) -> bool:
    if is_url(name):
        return bool(PATTERN.search(name)) or suffix_of(PurePosixPath(name)) is not None
    path = local_path(name)
    return is_spooled(name) or path.is_file() or (bool(PATTERN.search(name)) and not path.exists())


def _files(name: str, path: Path, split: str) -> list[Path]:
    """The files of a name; none if it is no local one. Raises DataError if it leads to other things than files."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return files_of(path, split)
    if not PATTERN.search(name):
        return []
    files = _matches(name, path)
    if not files:
        raise DataError(f"{name}: no file is of this pattern")
    folders = [str(file) for file in files if file.is_dir()]
    if folders:
        raise DataError(
            f"{name}: the pattern also fits the folder {folders[0]}: name files, for example with *.jsonl at its end"
        )
    unknown = [str(file) for file in files if suffix_of(file) is None or (file.exists() and not file.is_file())]
    if unknown:
        raise DataError(
            f"{name}: the pattern also fits {', '.join(unknown[:5])}; files ending in {', '.join(SUFFIXES)} are read"
        )
    return files


def _matches(name: str, path: Path) -> list[Path]:
    if path.exists() or not PATTERN.search(name):
        return []
    return sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207  # a pattern may be absolute


def _digest_of(name: str, files: list[Path], digests: list[str]) -> str:
    """sha256 of one file's bytes; of several files' names and digests."""
    root = local_path(name)
    if [root] == files:
        return digests[0]
    names = [str(file.relative_to(root) if root.is_dir() else file) for file in files]
    return hashlib.sha256(json.dumps(list(zip(names, digests, strict=True))).encode()).hexdigest()


def _data_set(shown: str, split: str, revision: str | None, folder: Path | None = None) -> tuple[list[Part], str]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    name = str(folder or shown)
    try:
        if is_saved(Path(name)):
            table = datasets.load_from_disk(name)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(name, split=split, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        # datasets reports a Hub that cannot be reached as a missing file or a connection error
        raise _unreachable(name, error) from None
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: {first_line(error)} (data.split is {split!r})") from None
    except Exception as error:  # noqa: BLE001  # the errors of the HTTP library below are none of theirs
        raise _unreachable(name, error) from None
    digest = hashlib.sha256(table._fingerprint.encode()).hexdigest()  # noqa: SLF001  # no public name

    def rows() -> Iterator[Row]:
        return iter(table)

    return [Part(shown, digest, rows, lambda: [Everything(rows)])], digest


def _unreachable(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: the data set cannot be loaded ({first_line(error)}). Without a network give data.path a local file "
        "or folder; with one, check the name, your rights (HF_TOKEN) and HF_HUB_OFFLINE"
    )
