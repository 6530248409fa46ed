"""metrics.parquet of one training: rows by step, whole on disk at any time; trackers are told the same."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.artifacts.schemas import METRICS
from pipeline.artifacts.tables import read_table, write_table
from pipeline.training.records.trackers import Tracker

_FLUSH_SECONDS = 5.0


class Metrics:
    """Collects one row per step and keeps metrics.parquet current; `resumed_at` drops rows after that step. Without a path
    nothing is written.
    """

    def __init__(self, path: Path | None, trackers: Sequence[Tracker], resumed_at: int | None) -> None:
        self._path, self._trackers = path, trackers
        self._rows: dict[int, dict[str, float]] = {}
        if resumed_at is not None and path is not None and path.exists():
            for row in read_table(path, METRICS).to_pylist():
                if row["step"] <= resumed_at:
                    self._rows[row.pop("step")] = {name: value for name, value in row.items() if value is not None}
        self._flushed = time.monotonic()

    def add(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Add `values` (names of METRICS without `prefix`) to the row of `step`."""
        named = {f"{prefix}{name}": value for name, value in values.items()}
        unknown = named.keys() - set(METRICS.names)
        if unknown:
            raise KeyError(f"not columns of metrics.parquet: {sorted(unknown)}")
        self._rows.setdefault(step, {}).update(named)
        for tracker in self._trackers:
            tracker.log(step, named)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write every row now."""
        if self._path is None:
            return
        rows = [{"step": step, **values} for step, values in sorted(self._rows.items())]
        columns = {name: [row.get(name) for row in rows] for name in METRICS.names}
        write_table(self._path, pa.table(columns, schema=METRICS))
        for tracker in self._trackers:
            tracker.flush()
        self._flushed = time.monotonic()

    def rows(self) -> list[dict[str, float]]:
        """Every row so far, by step."""
        return [values for _, values in sorted(self._rows.items())]

    def last(self, name: str) -> float | None:
        """The newest value of a column; None if that is no number."""
        return next(iter(reversed(self._column(name))), None)

    def first(self, name: str) -> float | None:
        """The oldest value of a column; None if that is no number."""
        return next(iter(self._column(name)), None)

    def close(self) -> None:
        """Write what is left and close the trackers."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def _column(self, name: str) -> list[float | None]:
        values = [row[name] for row in self.rows() if name in row]
        return [value if math.isfinite(value) else None for value in values]
