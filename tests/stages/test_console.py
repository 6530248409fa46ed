"""What long work shows where there is no terminal."""

from __future__ import annotations

import logging

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


def test_a_text_is_warned_of_once(capsys):
    console.speak()
    one, other = logging.getLogger("pipeline.some"), logging.getLogger("a.library")
    for logger in (one, other, one):
        logger.warning("%s is [not] whole", "x" * 150)
    one.info("begun")
    other.info("begun")
    one.debug("details")
    # as lines: neither padded nor folded
    assert capsys.readouterr().err == f"WARNING  {'x' * 150} is [not] whole\nINFO     begun\n"


def test_verbose_says_what_libraries_say_and_quiet_warnings_alone(capsys):
    try:
        for manner, expected in (({"verbose": True}, ["DEBUG", "INFO", "WARNING"]), ({"quiet": True}, ["WARNING"])):
            console.speak(**manner)
            logger = logging.getLogger("pipeline.some")
            logger.debug("a")
            logger.info("b")
            logger.warning("c")
            assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == expected
            console.working.say("step")
            assert capsys.readouterr().out == ("" if "quiet" in manner else "step\n")
    finally:
        console.speak()


def test_progress_that_goes_on_counts_from_where_it_was_and_forecasts_what_is_left(clock, capsys):
    with console.progress("training", 10, 6) as ticker:
        clock[0] += 20
        ticker.advance(2, "some")
    assert capsys.readouterr().out == "training 8/10  some  20 s left\n"


def test_tokens_are_told_per_second(clock, capsys):
    with console.progress("sampling", 4) as ticker:
        clock[0] += 5
        ticker.advance_tokens(4, 100)
    assert capsys.readouterr().out == "sampling 4/4  20 tokens/s  0 s left\n"


def test_every_device_of_every_engine_costs_from_its_start_to_its_end():
    reference = ReferenceConfig(price_per_hour=2.5, workers=2, tensor_parallel_size=2)
    # an hour to start, one for a quarter of the sequences, three to come: 10 per hour
    assert spent(reference, 7200, 3600, 0.25) == "20.00 of about 50.00"
