"""Writers and compactions killed at random moments, and beside one another: nothing lost, no traceback, no wrong number."""

from __future__ import annotations

import os
import random
import select
import signal
import time
import traceback

import pyarrow as pa
import pytest

from pipeline.store.tidying.compaction import compact
from tests.faults.conftest import EVERYTHING, found_numbers, open_store, oracle, shard_names

KILLS = 100 if EVERYTHING else 8
ROUNDS = 70 if EVERYTHING else 4
_AT_ONCE = 4


class Child:
    """A forked process that runs `work(say)`; what it says comes line by line, a traceback too."""

    def __init__(self, work) -> None:
        self._line, theirs = os.pipe()
        self.process = os.fork()
        self._said = b""
        if self.process:
            os.close(theirs)
            return
        os.close(self._line)
        status = 1
        try:
            # threads do not survive a fork; these are made anew
            pa.set_cpu_count(1)
            work(lambda *words: os.write(theirs, (" ".join(map(str, words)) + "\n").encode()))
            status = 0
        except BaseException:  # noqa: BLE001
            os.write(theirs, traceback.format_exc().encode())
        os._exit(status)

    def wait_for_a_line(self) -> None:
        select.select([self._line], [], [], 30)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> tuple[int, str]:
        """Exit status, and everything that was said."""
        while block := os.read(self._line, 65536):
            self._said += block
        os.close(self._line)
        return os.waitpid(self.process, 0)[1], self._said.decode()


def writer(where, first):
    def work(say):
        for start in range(first, first + 400, _AT_ONCE):
            open_store(where).publish([oracle(number) for number in range(start, start + _AT_ONCE)])
            say("published", start)

    return work


def published(said):
    lines = [line.split() for line in said.splitlines()]
    return {int(line[1]) + more for line in lines if line[0] == "published" for more in range(_AT_ONCE)}


@pytest.mark.timeout(1200)
def test_writers_killed_at_any_moment_lose_nothing_that_was_published(tmp_path, case):
    draw = random.Random(11)
    where = tmp_path / "store"
    safe: set[int] = set()
    begun = first = 0
    for kill in range(KILLS):
        if kill % 20 == 0:
            # a store of its own now and then, as every one is read whole after every kill
            where, safe, first = tmp_path / f"store{kill}", set(), begun
        child = Child(writer(where, begun))
        child.wait_for_a_line()
        time.sleep(draw.random() * 0.05)
        child.kill()
        status, said = child.end()
        assert "Traceback" not in said
        assert status == signal.SIGKILL
        safe |= published(said)
        # whatever is found is the oracle's, all that was published is found
        assert found_numbers(where, range(first, begun + 400)) >= safe
        begun += 400
        case("writer killed at a random moment: nothing published lost, no wrong number")
    assert safe


def compactor(where, seed):
    def work(say):
        draw = random.Random(seed)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            shards = shard_names(where)
            if len(shards) < 2:
                time.sleep(0.01)
                continue
            say("merged", compact(open_store(where), draw.sample(shards, min(len(shards), draw.randint(2, 6)))))

    return work


def short_writer(where, first):
    def work(say):
        for start in range(first, first + 40, _AT_ONCE):
            open_store(where).publish([oracle(number) for number in range(start, start + _AT_ONCE)])
            say("published", start)
            time.sleep(0.02)

    return work


@pytest.mark.timeout(1200)
def test_compactions_beside_readers_writers_and_other_compactions_lose_nothing(tmp_path, case):
    draw = random.Random(13)
    reads = merges = 0
    for number in range(ROUNDS):
        where = tmp_path / f"store{number}"
        for start in range(0, 80, _AT_ONCE):
            # neighbours overlap, so that keys stand in two shards
            open_store(where).publish([oracle(n) for n in range(start, start + _AT_ONCE + 2)])
        children = [
            Child(short_writer(where, 200)),
            Child(compactor(where, 3 * number)),
            Child(compactor(where, 3 * number + 1)),
        ]
        doomed = children[draw.randrange(3)] if number % 2 else None
        until = time.monotonic() + 0.1 + draw.random() * 0.3
        while time.monotonic() < until:
            assert found_numbers(where, range(82)) == set(range(82))
            reads += 1
        if doomed:
            doomed.kill()
        safe = set(range(82))
        for child in children:
            status, said = child.end()
            assert "Traceback" not in said, said
            assert status == 0 or child is doomed, said
            safe |= published(said)
            merges += said.count("merged") - said.count("merged None\n")
        assert found_numbers(where, range(300)) >= safe
        case("compactions beside a reader, a writer and another compaction, every second time one of them killed")
    assert reads >= ROUNDS
    assert merges >= ROUNDS
