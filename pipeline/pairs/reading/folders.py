"""The files of a folder that belong to a split. A folder is read whole, or refused with the names of what stands in the way."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError
from pipeline.pairs.reading.files import SUFFIXES, suffix_of
from pipeline.pairs.reading.remote import RemoteFile

# words in the names of files and folders that say which split they hold; the library `datasets` has the same
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# about the data, not data
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_DOCUMENTS = {
    ".md",
    ".txt",
    ".rst",
    ".html",
    ".pdf",
    ".png",
    ".jpg",
    ".svg",
    ".py",
    ".yaml",
    ".yml",
    ".toml",
    ".sh",
    ".lock",
    "",
}
_SHOWN = 5


def files_of(folder: Path, split: str) -> list[Path]:
    """The folder's files of a split, by name. Raises DataError if there is none, or if any file's part is not clear."""
    named = {str(path.relative_to(folder)): path for path in _walked(folder)}
    # a link to nowhere is met when it is read
    strange = {name for name, path in named.items() if path.exists() and not path.is_file()}
    return [named[name] for name in _of_split(str(folder), list(named), split, strange)]


def remote_files_of(folder: str, files: list[RemoteFile], split: str) -> list[RemoteFile]:
    """The same of a folder at a URL, which holds `files`."""
    named = {str(file).removeprefix(folder).lstrip("/"): file for file in files}
    shown = [name for name in named if not any(part.startswith((".", "__")) for part in name.split("/"))]
    return [named[name] for name in _of_split(folder, shown, split)]


def _of_split(folder: str, names: list[str], split: str, strange: Container[str] = ()) -> list[str]:
    """Those of a folder's files that are of a split; `strange` ones are none."""
    paths = sorted(map(PurePosixPath, names))
    found = [path for path in paths if path.suffix.lower() not in _DOCUMENTS and path.name not in _ABOUT]
    others = [path for path in found if suffix_of(path) is None or str(path) in strange]
    if others:
        raise DataError(
            f"{folder} also holds {_names(others)}, which {'is' if len(others) == 1 else 'are'} not read (read are "
            f"{', '.join(SUFFIXES)}): name the files that are meant, as a glob in quotes or a list"
        )
    if not found:
        raise DataError(f"{folder} holds no file of preference data ({', '.join(SUFFIXES)})")
    splits: dict[str, list[PurePosixPath]] = {}
    for path in found:
        splits.setdefault(_split_of(path), []).append(path)
    nowhere = splits.pop("", [])
    if not splits:
        splits, nowhere = {"train": nowhere}, []
    if nowhere:
        raise DataError(
            f"{folder}: {_names(nowhere)} {'belongs' if len(nowhere) == 1 else 'belong'} to no split, others to "
            f"{', '.join(splits)}: name the files that are meant, as a glob in quotes or a list"
        )
    if split not in splits:
        raise DataError(f"{folder} has no split {split!r}: its files give {', '.join(splits)} (data.split)")
    return [str(path) for path in splits[split]]


def left_to_datasets(folder: Path, split: str) -> bool:
    """Whether a folder says in the way of the library `datasets` how it is read, or a split is more than a name."""
    return bool(re.search(r"[\[+]", split)) or _has_card_with_configurations(folder) or is_saved(folder)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved this folder with save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _has_card_with_configurations(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return bool(header and re.search(r"^configs:", header[1], re.MULTILINE))


def _walked(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through links too, but what is hidden."""
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_cannot_be_listed, followlinks=True):
        # a link may lead back to where one is
        real = os.path.realpath(place)
        known = real in seen
        seen.add(real)
        folders[:] = [] if known else [name for name in folders if not name.startswith((".", "__"))]
        yield from (Path(place, name) for name in files if not known and not name.startswith((".", "__")))


def _cannot_be_listed(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})")


def _split_of(path: PurePosixPath) -> str:
    """The split that the names on the way to a file speak of: its folders' before its own."""
    for named in (path.parts[:-1], (path.name,)):
        words = {word for part in named for word in re.split(r"[-._ 0-9]+", part)}
        for split, names in _SPLITS.items():
            if words & set(names):
                return split
    return ""


def _names(paths: list[PurePosixPath]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(str, paths[:_SHOWN])) + more
