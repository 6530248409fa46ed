"""Scores the edge cases with a model that real vLLM spreads over two processes: run in a process of its own by the tests."""

import sys
from pathlib import Path

import numpy as np

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import numerics_of
from pipeline.engines.start import start_scorer
from tests.engines.sequences import LIMIT, edge_cases


def main(model: Path, target: Path) -> None:
    """Save all logps, concatenated in the order of the cases."""
    requests = [request for group in edge_cases(32).values() for request in group]
    reference = ReferenceConfig(model=str(model), dtype="float32", tensor_parallel_size=2)
    with start_scorer(reference, model, numerics_of(reference), LIMIT) as scorer:
        np.save(target, np.concatenate(scorer.score(requests)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
