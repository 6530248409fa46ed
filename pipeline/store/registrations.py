"""Which runs use a reference, kept in the store beside its scores, so that tidying in one checkout spares the runs of others.

At directories and URLs alike. `<store>/<reference_id>/runs/<digest of host and directory>.json` says host, directory and when
the run last used the reference. Whether a run is still there can be told on its own machine alone, and there only while the
directory that held it is there: a disk may not be mounted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.errors import RefscoreError, first_line
from pipeline.store.places import Entry, Place

log = logging.getLogger(__name__)

DAY = 24 * 3600
# of a place at once
_REQUESTS = 16
_FOLDER = "runs/"


@dataclass(frozen=True)
class Registration:
    """A run that used a reference: its host, its directory there, and when it did (seconds since 1970)."""

    host: str
    directory: str
    used: float

    @property
    def name(self) -> str:
        """The run's name."""
        return Path(self.directory).name

    @property
    def file(self) -> str:
        """Where it stands, below the reference."""
        digest = hashlib.sha256(f"{self.host}\0{self.directory}".encode()).hexdigest()
        return f"{_FOLDER}{digest[:32]}.json"

    def in_use(self) -> bool:
        """Whether the run may still need the reference: it used it within a day, it is there, or that cannot be told."""
        there = (
            self.host != platform.node() or Path(self.directory).is_dir() or not Path(self.directory).parent.is_dir()
        )
        return there or time.time() - self.used < DAY


def register(reference: Place, run: Path) -> None:
    """Write down at a reference's place that `run` uses it now; a place that holds nothing, or may not be written, is left."""
    if reference.name.startswith("hf://"):
        return  # where everything that is written is a commit
    entry = Registration(platform.node(), str(run.absolute()), time.time())
    try:
        reference.open("reference.json").close()
        reference.write(entry.file, json.dumps(vars(entry), indent=2).encode())
    except (RefscoreError, OSError) as error:
        log.debug("%s: the run is not registered (%s)", reference.name, first_line(error))


def registered(reference: Place, entries: Iterable[Entry]) -> list[Registration]:
    """Every run that is registered among the entries of a reference's place; what cannot be read counts as a run in use."""
    of_runs = [entry for entry in entries if entry.name.startswith(_FOLDER)]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(partial(_read, reference), of_runs))


def _read(reference: Place, entry: Entry) -> Registration:
    try:
        content = json.loads(reference.read(entry.name))
        host, directory, used = str(content["host"]), str(content["directory"]), float(content["used"])
    except (OSError, RefscoreError, ValueError, KeyError, TypeError):
        return Registration("", entry.name, time.time())
    # a clock that was wrong is told by that of the place
    return Registration(host, directory, used if 0 <= used < time.time() + DAY else entry.changed)
