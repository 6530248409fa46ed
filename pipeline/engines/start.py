"""What starts the engine that `reference` asks for, one in this process, and stops it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Scorer, must_compute
from pipeline.engines.single import start_single
from pipeline.hardware import return_freed_memory
from pipeline.store.identity import Numerics


@contextmanager
def start_scorer(reference: ReferenceConfig, directory: Path, numerics: Numerics, longest: int) -> Iterator[Scorer]:
    """Load the model at `directory` into the configured engine, and stop it afterwards.

    `longest` is the longest sequence in tokens. Raises ConfigError if scores are imported.
    """
    must_compute(numerics)
    scorer = start_single(reference, directory, numerics, longest)
    try:
        yield scorer
    finally:
        scorer.close()
        # joining pairs and scores comes next, and would stand beside what the engine leaves behind
        gc.collect()
        return_freed_memory()
