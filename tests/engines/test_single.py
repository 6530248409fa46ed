"""An engine that runs out of memory is started smaller once; every other failure passes."""

import logging

import numpy as np
import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import Request
from pipeline.engines.single import SmallerOnce
from pipeline.engines.vllm.engine import prepare_environment
from pipeline.errors import ConfigError, RefscoreError


class Hungry:
    """An engine for which forward passes above `enough` tokens are too large."""

    def __init__(self, reference, enough, error):
        self.batched_tokens = reference.max_batched_tokens or 1024
        self.enough, self.error, self.closed = enough, error, False

    def score(self, sequences):
        if self.batched_tokens > self.enough:
            raise self.error
        return [np.full(len(one.response_ids), -1, np.float32) for one in sequences]

    def close(self):
        self.closed = True


REFUSED = RuntimeError("DefaultCPUAllocator: can't allocate memory")


def started(enough, error=REFUSED):
    engines = []

    def start(reference):
        engines.append(Hungry(reference, enough, error))
        return engines[-1]

    return SmallerOnce(ReferenceConfig(), start), engines


def test_a_smaller_engine_takes_over_and_the_log_says_what_to_set(caplog):
    scorer, engines = started(600)
    with caplog.at_level(logging.WARNING):
        assert scorer.score([Request([1], [2, 3])])[0].tolist() == [-1, -1]
    assert [engine.batched_tokens for engine in engines] == [1024, 512]
    assert engines[0].closed
    assert "set reference.max_batched_tokens=512 to begin so" in caplog.text


def test_one_whose_smaller_engine_does_not_start_is_closed_once_and_says_why():
    engines = []

    def start(reference):
        if engines:
            raise RuntimeError("can't allocate memory for the smaller one either")
        engines.append(Hungry(reference, 0, REFUSED))
        engines[0].close = lambda: closed.append(1)
        return engines[0]

    closed = []
    scorer = SmallerOnce(ReferenceConfig(), start)
    with pytest.raises(RuntimeError, match="smaller one either"):
        scorer.score([Request([1], [2])])
    # as `start_scorer` does on the way out: an engine that was closed has nothing more to close
    scorer.close()
    assert closed == [1]


def test_it_is_done_once():
    scorer, engines = started(100, error=MemoryError())
    with pytest.raises(RefscoreError, match=r"set reference.max_batched_tokens=256 or less"):
        scorer.score([Request([1], [2])])
    assert len(engines) == 2


def test_other_errors_pass():
    scorer, engines = started(0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        scorer.score([Request([1], [2])])
    assert len(engines) == 1


def test_a_model_is_not_spread_over_more_processors_than_there_are():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 99, but there are"):
        prepare_environment(99)
