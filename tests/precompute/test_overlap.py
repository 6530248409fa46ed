"""The next item is prepared and the last one put away while one is scored; errors of each come out, and nothing scored is lost."""

import threading
import time

import pytest

from pipeline.precompute.overlap import Ahead, overlapped


class Broken(Exception):
    pass


def run(items, score=lambda item: item, put_away=lambda item, scores: None):
    kept = []

    def keep(item, scores):
        put_away(item, scores)
        kept.append((item, scores))

    try:
        overlapped(items, score, keep)
    except (Broken, KeyboardInterrupt) as error:
        return kept, error
    return kept, None


def test_all_are_scored_and_put_away_in_order():
    assert run(iter(range(20)), lambda item: item * item) == ([(item, item * item) for item in range(20)], None)
    assert run([]) == ([], None)


def test_while_one_is_scored_the_next_is_prepared_and_the_last_is_put_away():
    """Each of the three waits for another of them: in one thread none would end."""
    prepared, put_away = threading.Event(), threading.Event()

    def items():
        yield 0
        yield 1
        prepared.set()
        yield 2

    def score(item):
        if item == 1:
            # the item after it is prepared, and the one before is put away, meanwhile
            assert prepared.wait(10)
            assert put_away.wait(10)
        return item

    assert run(items(), score, lambda item, _: put_away.set() if item == 0 else None)[1] is None


def test_the_engine_stays_in_the_thread_that_calls():
    threads = {"score": set(), "put away": set()}
    run(
        range(4),
        lambda _: threads["score"].add(threading.get_ident()),
        lambda *_: threads["put away"].add(threading.get_ident()),
    )
    assert threads["score"] == {threading.get_ident()}
    assert threads["put away"].isdisjoint(threads["score"])


def fail(*_):
    raise Broken


def test_what_goes_wrong_in_preparing_comes_out_after_what_was_prepared():
    def items():
        yield from range(3)
        raise Broken

    kept, error = run(items())
    assert [item for item, _ in kept] == [0, 1, 2]
    assert isinstance(error, Broken)


@pytest.mark.parametrize("stop", [Broken, KeyboardInterrupt])
def test_what_was_scored_before_it_stopped_is_put_away(stop):
    def score(item):
        if item == 3:
            raise stop
        return item

    kept, error = run(range(9), score, lambda *_: time.sleep(0.05))
    assert [item for item, _ in kept] == [0, 1, 2]
    assert isinstance(error, stop)


def test_what_goes_wrong_in_putting_away_stops_it_with_the_next_item_or_at_the_end():
    scored = []
    for items in (range(9), range(1)):
        scored.clear()
        kept, error = run(items, scored.append, fail)
        assert kept == []
        assert isinstance(error, Broken)
        assert len(scored) <= 2


def test_what_the_iterator_holds_is_let_go_of_when_nobody_wants_more():
    ended = threading.Event()

    def items():
        try:
            yield from range(100)
        finally:
            ended.set()

    with Ahead(items()) as ahead:
        assert next(iter(ahead)) == 0
    assert ended.is_set()
