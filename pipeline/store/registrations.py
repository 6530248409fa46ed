"""Which runs use a reference, kept in the store beside its scores, so that tidying in one checkout spares the runs of others.

`<store>/<reference_id>/runs/<digest of host and directory>.json` says host, directory and when the run last used the reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import durable
from pipeline.errors import RefscoreError, first_line

log = logging.getLogger(__name__)

DAY = 24 * 3600


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


def register(reference: Path, run: Path) -> None:
    """Write down that `run` uses the reference in the directory `reference` now; a directory that cannot be written is left."""
    entry = Registration(platform.node(), str(run.absolute()), time.time())
    name = hashlib.sha256(f"{entry.host}\0{entry.directory}".encode()).hexdigest()[:32]
    try:
        durable.write_json(reference / "runs" / f"{name}.json", vars(entry))
    except (RefscoreError, OSError) as error:
        log.debug("%s: the run is not registered (%s)", reference, first_line(error))


def registered(reference: Path) -> list[Registration]:
    """Every run that is registered in the reference's directory; what cannot be read counts as a run in use."""
    return [_read(path) for path in sorted((reference / "runs").glob("*.json"))]


def _read(path: Path) -> Registration:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Registration(str(content["host"]), str(content["directory"]), float(content["used"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Registration("", str(path), time.time())
