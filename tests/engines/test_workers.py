"""Several engines in processes of their own: how sequences are shared out, and how they start and end.

That they give the bits of one, also when one of them dies, is in test_vllm_scorer.py, which has those bits.
"""

import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.protocol import numerics_of
from pipeline.engines.start import start_scorer
from pipeline.engines.vllm.engine import prepare_environment
from pipeline.engines.workers import Workers, _Worker, parts_of
from pipeline.errors import ConfigError, RefscoreError
from pipeline.hardware import processors
from tests.engines.sequences import LIMIT, edge_cases

REQUESTS = [request for group in edge_cases(32).values() for request in group]


def test_a_model_is_not_spread_over_more_processors_than_there_are():
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 99, but there are"):
        prepare_environment(99)


def test_parts_keep_siblings_together_and_are_of_about_one_size():
    parts = parts_of(REQUESTS, 3)
    assert sorted(at for part in parts for at in part) == list(range(len(REQUESTS)))
    owners = {}
    for number, part in enumerate(parts):
        for at in part:
            assert owners.setdefault(tuple(REQUESTS[at].prompt_ids), number) == number
    sizes = [sum(len(REQUESTS[at]) for at in part) for part in parts]
    assert max(sizes) < 1.5 * min(sizes)


def test_more_workers_than_processors_are_refused(tiny_model):
    reference = ReferenceConfig(model=str(tiny_model), engine="transformers", workers=1 + len(processors()))
    with (
        pytest.raises(ConfigError, match=r"reference\.workers is"),
        start_scorer(reference, tiny_model, numerics_of(reference), LIMIT),
    ):
        pass


def test_what_keeps_one_worker_from_starting_ends_the_others(tiny_model, monkeypatch):
    stopped = []

    class Worker:
        def __init__(self, number, *_):
            self.number = number

        def wait_until_ready(self):
            if self.number:
                raise RefscoreError("too little memory")

        def stop(self):
            stopped.append(self.number)

    monkeypatch.setattr("pipeline.engines.workers._Worker", Worker)
    monkeypatch.setattr("pipeline.engines.workers.processors", lambda: [0, 1])
    reference = ReferenceConfig(model=str(tiny_model), engine="transformers", workers=2)
    with pytest.raises(RefscoreError, match="too little memory"):
        Workers(reference, tiny_model, numerics_of(reference), LIMIT)
    assert stopped == [0, 1]


def test_a_worker_may_have_children_and_ends_with_its_line(tiny_model):
    """A model that is spread over GPUs has a process per GPU, which a daemon could not start."""
    reference = ReferenceConfig(model=str(tiny_model), engine="transformers")
    share = ",".join(map(str, processors()))
    worker = _Worker(0, share, reference, tiny_model, numerics_of(reference), LIMIT)
    worker.wait_until_ready()
    assert not worker._process.daemon
    worker._line.close()
    worker._process.join(30)
    assert worker._process.exitcode == 0
