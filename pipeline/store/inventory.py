"""What a store's directory holds, reference by reference: for people, and for tidying."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError, DataError
from pipeline.models.identity import VERSION
from pipeline.store.identity import IMPORTED, numerics_in_words
from pipeline.store.places import is_url
from pipeline.store.shard import Unsound, key_words, open_shard, shard_files
from pipeline.store.store import read_reference


@dataclass(frozen=True)
class Holding:
    """One reference's part of a store; `tokens` are those of prompts and responses, `problems` sentences for people."""

    directory: Path
    numerics: str
    sequences: int
    tokens: int
    shards: int
    bytes: int
    problems: list[str]


def holdings(store: str) -> list[Holding]:
    """What the store has of every reference. Raises ConfigError for a URL, DataError if it cannot be listed."""
    return [_holding(directory) for directory in references(store)]


def references(store: str) -> list[Path]:
    """Directories of the references in a store. Raises ConfigError for a URL, DataError if it cannot be listed."""
    if is_url(store):
        raise ConfigError(
            f"{store}: only directories are listed and tidied here; a bucket's own tools do that for a URL"
        )
    if not Path(store).is_dir():
        raise DataError(f"store {store} does not exist: 'refscore precompute' makes it, or name another with --store")
    try:
        directories = sorted(Path(store).iterdir())
    except OSError as error:
        raise DataError(f"store {store} cannot be listed ({error.strerror}): mend its rights") from None
    return [directory for directory in directories if (directory / "reference.json").exists()]


def is_imported(directory: Path) -> bool:
    """Whether a reference's scores were computed elsewhere, so that what is lost of them is not computed again."""
    try:
        return bool(read_reference(directory)["numerics"].get("engine") == IMPORTED)
    except DataError:
        return False


def bytes_of(paths: list[Path]) -> int:
    """Bytes of those files that are there."""
    size = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def _holding(directory: Path) -> Holding:
    numerics, problem = _numerics(directory)
    words: list[np.ndarray] = [np.empty((0, 4), np.uint64)]
    tokens: list[np.ndarray] = [np.empty(0, np.int64)]
    shards = size = damaged = 0
    for shard in shard_files(directory):
        try:
            with open_shard(shard) as file:
                table = file.read(columns=["key", "prompt_tokens", "response_tokens"])
            words.append(key_words(table))
            tokens.append(table["prompt_tokens"].to_numpy().astype(np.int64) + table["response_tokens"].to_numpy())
            size += shard.stat().st_size
            shards += 1
        except FileNotFoundError:
            continue
        except Unsound:
            damaged += 1
    _, firsts = np.unique(np.concatenate(words), axis=0, return_index=True)
    problems = [problem] if problem else []
    if damaged:
        problems.append(f"{directory}: {damaged} shards cannot be read: 'refscore store verify' sets them aside")
    return Holding(directory, numerics, len(firsts), int(np.concatenate(tokens)[firsts].sum()), shards, size, problems)


def _numerics(directory: Path) -> tuple[str, str | None]:
    """The reference's numerics in words, and what is wrong with it, if anything is."""
    try:
        content = read_reference(directory)
    except DataError as problem:
        return "unknown", str(problem)
    words = numerics_in_words(content["numerics"])
    if content.get("version") == VERSION:
        return words, None
    return words, (
        f"{directory}: an identity of version {content.get('version')}, for which this refscore (version {VERSION}) never asks: "
        "its sequences are scored again; 'refscore store gc --apply --unreferenced' deletes it once no run uses it"
    )
