"""What long work shows where there is no terminal."""

from __future__ import annotations

import pytest

from pipeline.config.experiment import ReferenceConfig
from pipeline.precompute.launch import spent
from stages import console


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_after_a_minute_progress_is_a_line_per_minute(clock, capsys):
    with console.progress("scoring", 1000) as ticker:
        for _ in range(1000):
            clock[0] += 1
            ticker.advance(1, "some")
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines[:8]] == [1, 11, 21, 31, 41, 51, 111, 171]
    assert lines[-1].startswith("scoring 1000/1000  some  0 s left")
    assert lines[7].endswith("13 min 49 s left")


def test_tokens_are_told_per_second(clock, capsys):
    with console.progress("sampling", 4) as ticker:
        clock[0] += 5
        ticker.advance_tokens(4, 100)
    assert capsys.readouterr().out == "sampling 4/4  20 tokens/s  0 s left\n"


def test_every_device_of_every_engine_costs_from_its_start_to_its_end():
    reference = ReferenceConfig(price_per_hour=2.5, workers=2, tensor_parallel_size=2)
    # an hour to start, one for a quarter of the sequences, three to come: 10 per hour
    assert spent(reference, 7200, 3600, 0.25) == "20.00 of about 50.00"
