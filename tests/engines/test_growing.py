"""An engine that is started for the longest sequence so far, and again for a longer one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pipeline.engines import growing
from pipeline.engines.growing import Growing
from pipeline.engines.protocol import Request


class Reference:
    """Notes with which length it is started, and when it is stopped."""

    config = SimpleNamespace(engine="some")
    paths = SimpleNamespace(base=None)

    def __init__(self):
        self.told = []

    @contextmanager
    def start(self, longest):
        self.told.append(longest)
        yield SimpleNamespace(score=lambda sequences: [longest] * len(sequences))
        self.told.append("stopped")


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setattr(growing, "position_limit", lambda _: 600)
    return Reference()


def of_length(*lengths):
    return [Request([1], [2] * (length - 1)) for length in lengths]


def test_it_starts_with_the_first_and_again_larger(reference):
    with Growing(reference, None) as engine:
        assert reference.told == []
        assert engine.score(of_length(20, 33)) == [64, 64]
        assert engine.score(of_length(64)) == [64]
        assert engine.score(of_length(65, 2)) == [128, 128]
        # never more than the model has positions for
        engine.score(of_length(513))
    assert reference.told == [64, "stopped", 128, "stopped", 600, "stopped"]


def test_a_limit_that_is_known_is_what_it_starts_with(reference):
    with Growing(reference, 100) as engine:
        engine.score(of_length(5))
        engine.score(of_length(100))
        engine.score(of_length(101))
    assert reference.told == [100, "stopped", 101, "stopped"]


def test_what_was_closed_starts_again(reference):
    begun = []
    with Growing(reference, 10, on_ready=lambda: begun.append(len(reference.told))) as engine:
        engine.score(of_length(3))
        engine.close()
        engine.score(of_length(3))
    assert reference.told == [10, "stopped", 10, "stopped"]
    # what was scored before counts: the time since it was first ready is what it took
    assert begun == [1]
