"""Which runs use a reference, kept in the store beside its scores, so that tidying in one checkout spares the runs of others.

At directories and URLs alike. `<store>/<reference_id>/runs/<digest of host and directory>.json` says host, directory and when
the run last used the reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RefscoreError, first_line
from pipeline.store.places import Entry, Place

log = logging.getLogger(__name__)

DAY = 24 * 3600
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

    def in_use(self) -> bool:
        """Whether the run may still need the reference: it is there, it is on another machine, or it used it within a day."""
        elsewhere = self.host != platform.node()
        return elsewhere or time.time() - self.used < DAY or Path(self.directory).is_dir()


def register(reference: Place, run: Path) -> None:
    """Write down at a reference's place that `run` uses it now; a place that holds nothing, or may not be written, is left."""
    if reference.name.startswith("hf://"):
        return  # where everything that is written is a commit
    entry = Registration(platform.node(), str(run.absolute()), time.time())
    name = hashlib.sha256(f"{entry.host}\0{entry.directory}".encode()).hexdigest()[:32]
    try:
        reference.open("reference.json").close()
        reference.write(f"{_FOLDER}{name}.json", json.dumps(vars(entry), indent=2).encode())
    except (RefscoreError, OSError) as error:
        log.debug("%s: the run is not registered (%s)", reference.name, first_line(error))


def registered(reference: Place, entries: Iterable[Entry]) -> list[Registration]:
    """Every run that is registered among the entries of a reference's place; what cannot be read counts as a run in use."""
    return [_read(reference, entry) for entry in entries if entry.name.startswith(_FOLDER)]


def _read(reference: Place, entry: Entry) -> Registration:
    try:
        content = json.loads(reference.read(entry.name))
        return Registration(str(content["host"]), str(content["directory"]), float(content["used"]))
    except (OSError, RefscoreError, ValueError, KeyError, TypeError):
        return Registration("", entry.name, time.time())
