"""What a store holds, reference by reference, at a directory or a URL: for people, and for tidying."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.models.identity import VERSION
from pipeline.store.identity import IMPORTED, numerics_in_words
from pipeline.store.places import Entry, Place
from pipeline.store.shard import SHARD, Unsound, open_shard, words_of
from pipeline.store.store import open_place, read_reference
from pipeline.store.transfer import reference_names

# of a place at once
REQUESTS = 16


@dataclass(frozen=True)
class Holding:
    """One reference's part of a store; `tokens` are those of prompts and responses, `problems` sentences for people."""

    reference_id: str
    directory: str
    numerics: str
    sequences: int
    tokens: int
    shards: int
    bytes: int
    problems: list[str]


def references(store: str) -> dict[str, Place]:
    """The references in a store, by id: everything that is named like one and has a reference.json.

    Raises DataError if there is no such store, RefscoreError if it cannot be listed.
    """
    places = {name: open_place(store, name, first=False) for name in reference_names(store)}
    return {name: place for name, place in places.items() if is_described(place)}


def is_described(place: Place) -> bool:
    """Whether a place says which reference it holds."""
    try:
        place.open("reference.json").close()
    except FileNotFoundError:
        return False
    return True


def holding(reference_id: str, place: Place) -> Holding:
    """What a place has of a reference. Reads keys and numbers of tokens of every shard, not the scores."""
    numerics, problem = _numerics(place)
    shards = shard_entries(place.entries())
    with ThreadPoolExecutor(REQUESTS) as pool:
        read = [
            (entry, rows) for entry, rows in zip(shards, pool.map(partial(_rows, place), shards), strict=True) if rows
        ]
    keys = np.concatenate([np.empty(0, np.uint64), *(rows.keys for _, rows in read)])
    tokens = np.concatenate([np.empty(0, np.int32), *(rows.tokens for _, rows in read)])
    sequences, total = _distinct(keys, tokens)
    problems = [problem] if problem else []
    if damaged := sum(rows.damaged for _, rows in read):
        problems.append(f"{place.name}: {damaged} shards cannot be read: 'refscore store verify' sets them aside")
    sound = [entry.bytes for entry, rows in read if not rows.damaged]
    return Holding(reference_id, place.name, numerics, sequences, total, len(sound), sum(sound), problems)


def shard_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Those of the entries that are shards, by their names."""
    return [entry for entry in entries if SHARD.fullmatch(entry.name)]


def is_imported(place: Place) -> bool:
    """Whether a reference's scores were computed elsewhere, so that what is lost of them is not computed again."""
    try:
        return bool(read_reference(place)["numerics"].get("engine") == IMPORTED)
    except DataError:
        return False


@dataclass(frozen=True)
class _Rows:
    """Of the rows of a shard: the first eight bytes of their keys, and their numbers of tokens. None of a damaged one."""

    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    damaged: bool = True


def _rows(place: Place, entry: Entry) -> _Rows | None:
    """None of a shard that is gone."""
    try:
        with place.open(entry.name) as content, open_shard(Path(entry.name), content) as file:
            table = file.read(columns=["key", "prompt_tokens", "response_tokens"])
    except FileNotFoundError:
        return None
    except Unsound:
        return _Rows()
    # a quarter of the memory of whole keys; of 50 million some two begin alike once in ten thousand stores
    keys = words_of(table["key"].combine_chunks())[:, 0].copy()
    return _Rows(keys, table["prompt_tokens"].to_numpy() + table["response_tokens"].to_numpy(), damaged=False)


def _distinct(keys: np.ndarray, tokens: np.ndarray) -> tuple[int, int]:
    """How many keys there are, each counted once, and how many tokens they have."""
    order = np.argsort(keys)
    new = np.ones(len(keys), dtype=bool)
    new[1:] = keys[order[1:]] != keys[order[:-1]]
    return int(new.sum()), int(tokens[order][new].sum(dtype=np.int64))


def _numerics(place: Place) -> tuple[str, str | None]:
    """The reference's numerics in words, and what is wrong with it, if anything is."""
    try:
        content = read_reference(place)
    except DataError as problem:
        return "unknown", str(problem)
    words = numerics_in_words(content["numerics"])
    if content.get("version") == VERSION:
        return words, None
    return words, (
        f"{place.name}: an identity of version {content.get('version')}, for which this refscore (version {VERSION}) never asks: "
        "its sequences are scored again; 'refscore store gc --apply --unreferenced' deletes it once no run uses it"
    )
