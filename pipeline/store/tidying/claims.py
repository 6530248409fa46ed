"""Who works on what at a place, so that many processes share work out instead of doing it twice: files that may not be there yet.

Claims save work; nothing rests on them. Two processes that merge the same shards publish the same rows. A claim counts no
longer once its process is gone, as far as this machine can tell, and in no case after `_STALE` seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError
from pipeline.store.places import Entry, Place

FOLDER = "claims/"
_STALE = 3600


@contextmanager
def claiming(place: Place, names: Sequence[str]) -> Iterator[bool]:
    """Claim these files at a place as long as the block lasts; whether they are ours. Raises RefscoreError if the place refuses."""
    claim = f"{FOLDER}{hashlib.sha256(' '.join(names).encode()).hexdigest()}.json"
    ours = place.create(
        claim, json.dumps({"machine": durable.machine(), "pid": os.getpid(), "names": list(names)}).encode()
    )
    try:
        yield ours
    finally:
        if ours:
            place.remove(claim)


def claimed(place: Place, entries: Iterable[Entry]) -> set[str]:
    """The files that processes claim by claims among the entries of a place. Nothing is removed: who looks may only look."""
    names: set[str] = set()
    for entry in entries:
        if entry.name.startswith(FOLDER):
            names.update(_names(place, entry) or ())
    return names


def sweep(place: Place, entries: Iterable[Entry]) -> None:
    """Remove those of the claims among the entries of a place that count no longer. Raises RefscoreError if the place refuses."""
    for entry in entries:
        if entry.name.startswith(FOLDER) and _names(place, entry) is None:
            place.remove(entry.name)


def _names(place: Place, entry: Entry) -> list[str] | None:
    """What a claim is of; None if it counts no longer."""
    try:
        claim = json.loads(place.read(entry.name))
        gone = claim["machine"] == durable.machine() and not durable.lives(claim["pid"])
        names = [str(name) for name in claim["names"]]
    except FileNotFoundError:
        return []
    except (RefscoreError, ValueError, KeyError, TypeError):
        gone, names = False, []  # it is being written, or nobody's
    return None if gone or time.time() - entry.changed > _STALE else names
