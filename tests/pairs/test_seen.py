"""The set of digests on disk holds what a set of Python's holds, however many runs it has and however alike digests begin."""

import errno
import os
import random

import numpy as np
import pytest

from pipeline.errors import RefscoreError
from pipeline.pairs.tokenised import seen
from pipeline.pairs.tokenised.seen import DigestSet


def as_array(digests, width):
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, width)


@pytest.fixture(params=["in memory", "in files"])
def where(request, monkeypatch):
    if request.param == "in files":
        monkeypatch.setattr(seen, "_IN_MEMORY", 4)
        monkeypatch.setattr(seen, "_AT_ONCE", 16)
    return request.param


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("alike", [False, True], ids=["any", "alike"])
def test_it_holds_what_a_set_holds(where, width, alike):
    draw, digests, known = random.Random(width), DigestSet(), set()
    # few different beginnings, and ends of which many are equal
    begins = [draw.randbytes(8) for _ in range(3)]
    ends = [draw.randbytes(width - 8) for _ in range(300)]
    for size in [0, 1, 1, 7, 30, 0, 2, 100, 5, 5, 5, 400, 1, 33]:
        batch = [
            draw.choice(begins) + draw.choice(ends)
            if alike
            else draw.randbytes(1) * 8 + draw.randbytes(1) * (width - 8)
            for _ in range(size)
        ]
        asked = [*batch, *(draw.randbytes(width) for _ in range(5))]
        assert digests.holds(as_array(asked, width)).tolist() == [one in known for one in asked]
        first = []
        for one in batch:
            first.append(one not in known)
            known.add(one)
        assert digests.add(as_array(batch, width)).tolist() == first
        assert len(digests) == len(known)
    assert digests.holds(as_array(sorted(known), width)).all()
    files = [run for run in digests._runs if isinstance(run, np.memmap)]
    assert bool(files) == (where == "in files")
    assert len(digests._runs) < 8


def test_runs_are_as_few_as_the_logarithm_of_the_digests(where):
    digests, draw = DigestSet(), np.random.default_rng(0)
    moved, real = [], seen._merged
    seen_merged = lambda one, other: moved.append(len(one) + len(other)) or real(one, other)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "_merged", seen_merged)
        for _ in range(256):
            digests.add(draw.integers(0, 256, (16, 16), np.uint8))
    assert len(digests) == 4096
    assert len(digests._runs) <= 8
    # each digest was moved about as often as sizes double
    assert sum(moved) < 4096 * 12


def test_digests_that_part_in_their_last_byte_are_two(where):
    one = bytes(32)
    other = bytes(31) + b"\x01"
    digests = DigestSet()
    assert digests.add(as_array([other, other], 32)).tolist() == [True, False]
    assert digests.holds(as_array([one, other], 32)).tolist() == [False, True]
    assert digests.add(as_array([one, other, one], 32)).tolist() == [True, False, False]


def test_a_full_disk_is_said_before_anything_is_written_to_it(monkeypatch):
    """A mapped file that finds no room for what is written to it would end the process."""

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(seen, "_IN_MEMORY", 4)
    digests = DigestSet()
    digests.add(as_array([bytes([number] * 32) for number in range(4)], 32))
    with pytest.raises(RefscoreError, match=r"no space left to write .*: about 256 bytes are needed"):
        digests.add(as_array([bytes([number] * 32) for number in range(4, 8)], 32))
