"""Scoring goes on while rows are planned: what is said of it, and that the first scores are stored before the last row is read."""

import threading
import time
from contextlib import contextmanager

import pytest

from pipeline.config.files import load_config
from pipeline.engines.reference import OpenedReference
from pipeline.errors import RefscoreError
from pipeline.precompute.launch import score_windows
from pipeline.precompute.plan import Window, make_plan
from pipeline.precompute.score import windows_of
from tests.conftest import experiment, preference_rows, write_rows
from tests.precompute.scoring import not_in_an_index


class Heard:
    """A listener that keeps what it hears; of progress the total, and what was said of it."""

    def __init__(self):
        self.lines, self.expected, self.ticks = [], [], []
        self.started = time.monotonic()

    def say(self, text):
        self.lines.append(text)

    @contextmanager
    def progress(self, title, total, done=0):
        yield self

    def expect(self, total, *, about):
        self.expected.append((total, about))

    def advance(self, units, text):
        self.ticks.append((units, text))


@pytest.fixture
def plan(tmp_path, tiny_model):
    data = write_rows(tmp_path / "d.jsonl", preference_rows(12))
    settings = ["reference.tokens_per_shard=150", "reference.price_per_hour=2"]
    return make_plan(load_config(experiment(tmp_path, tiny_model, data), settings))


def in_parts(plan, shares):
    """What the plan lacks in as many windows as there are shares, of all that is read by then."""
    (whole,) = windows_of(plan)
    size = -(-len(whole.missing) // len(shares))
    return [Window(whole.missing.slice(number * size, size), share) for number, share in enumerate(shares)]


def test_scores_are_stored_before_the_last_row_is_read(plan, tmp_path):
    first, second = in_parts(plan, [0.5, 1.0])

    def windows():
        yield first
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("data/store/*/scores-*.parquet")):
            assert time.monotonic() < deadline, "nothing is stored before all is planned"
            time.sleep(0.01)
        yield second

    outcome = score_windows(plan.reference, windows())
    assert outcome.sequences == 24
    # all that was published stands in an index by now
    assert not not_in_an_index(plan.store)
    assert not len(plan.store.lookup(plan.keys).missing)


def test_what_is_to_come_is_forecast_from_what_is_read(plan):
    heard = Heard()
    windows = in_parts(plan, [0.25, 0.5, 1.0])
    outcome = score_windows(plan.reference, iter(windows), listener=heard)
    assert heard.expected == [(32, True), (32, True), (24, False)]
    assert sum(units for units, _ in heard.ticks) == outcome.sequences == 24
    assert outcome.tokens == plan.missing_tokens
    assert all("sequences/s" in text and "tokens/s" in text and " spent" in text for _, text in heard.ticks)
    assert heard.lines[0] == "starting transformers ..."
    assert heard.lines[1].startswith("engine ready after")


@pytest.mark.parametrize(
    ("shares", "first_missing", "expected"),
    [
        # the first half is in the store, as a run was interrupted there: the rest is not
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 5, [20, 20, 20, 20, 20]),
        # one that was interrupted soon
        ([0.25, 0.5, 0.75, 1.0], 1, [12, 12, 12]),
    ],
)
def test_what_is_to_come_is_like_what_was_read_last(plan, shares, first_missing, expected):
    heard, (whole,) = Heard(), windows_of(plan)
    rows = [4 if number >= first_missing else 0 for number in range(len(shares))]
    begins = [sum(rows[:number]) for number in range(len(rows))]
    windows = [
        Window(whole.missing.slice(begin, count), share)
        for begin, count, share in zip(begins, rows, shares, strict=True)
    ]
    score_windows(plan.reference, windows, listener=heard)
    assert [total for total, _ in heard.expected] == expected


def test_the_next_window_is_planned_while_the_first_shard_of_this_one_is_scored(plan, monkeypatch):
    """Otherwise planning begins with the last but two of a window's shards, and the engine waits for what it has not done by then."""
    first, second = in_parts(plan, [0.5, 1.0])
    monkeypatch.setattr("pipeline.precompute.score._SHARDS_AT_LEAST", 0)
    begun, scored, inner = threading.Event(), [], OpenedReference.start

    @contextmanager
    def waiting(reference, longest):
        with inner(reference, longest) as scorer:
            score = scorer.score

            def when_planned(sequences):
                scored.append(len(sequences))
                assert begun.wait(20), "nothing is planned meanwhile"
                return score(sequences)

            monkeypatch.setattr(scorer, "score", when_planned)
            yield scorer

    monkeypatch.setattr(OpenedReference, "start", waiting)

    def windows():
        yield first
        if len(scored) < 2:
            begun.set()
        yield second

    before = threading.active_count()
    assert score_windows(plan.reference, windows()).sequences == 24
    assert len(scored) > 8
    assert threading.active_count() == before


def test_no_more_than_a_window_is_planned_ahead(plan, monkeypatch):
    planned, most, inner = [], [], OpenedReference.start

    @contextmanager
    def noting(reference, longest):
        with inner(reference, longest) as scorer:
            score = scorer.score
            monkeypatch.setattr(
                scorer, "score", lambda sequences: (time.sleep(0.2), most.append(len(planned)), score(sequences))[2]
            )
            yield scorer

    monkeypatch.setattr(OpenedReference, "start", noting)
    monkeypatch.setattr("pipeline.precompute.score._SHARDS_AT_LEAST", 0)

    def windows():
        for number, window in enumerate(in_parts(plan, [number / 12 for number in range(1, 13)])):
            planned.append(number)
            yield window

    score_windows(plan.reference, windows())
    # in the engine, in two shards behind it, waiting, and in the planning thread's hands
    assert most[0] <= 6


def test_the_engine_is_made_for_what_is_known_to_come(plan, monkeypatch):
    asked, start = [], OpenedReference.start

    def noted(reference, longest):
        asked.append(longest)
        return start(reference, longest)

    monkeypatch.setattr(OpenedReference, "start", noted)
    (whole,) = in_parts(plan, [1.0])
    score_windows(plan.reference, [whole], limit=200)
    # all is read, so nothing longer comes
    assert asked == [plan.longest_missing]


def test_it_is_started_again_for_a_longer_sequence_and_that_is_said(plan, monkeypatch):
    heard = Heard()
    (whole,) = windows_of(plan)
    rows = whole.missing.to_pylist()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["prompt_ids"]) + len(rows[row]["response_ids"]))
    lengths = [len(rows[row]["prompt_ids"]) + len(rows[row]["response_ids"]) for row in order]
    assert lengths[0] <= 64 < lengths[-1]
    windows = [Window(whole.missing.take([order[0]] * 1), 0.1), Window(whole.missing.take(order[1:]), 0.9)]
    monkeypatch.setattr("pipeline.precompute.score._SHARDS_AT_LEAST", 0)
    outcome = score_windows(plan.reference, windows, listener=heard)
    assert outcome.sequences == 24
    assert [line for line in heard.lines if "again: a sequence has" in line]


def test_nothing_is_started_if_nothing_is_missing(plan):
    score_windows(plan.reference, windows_of(plan))
    heard = Heard()
    outcome = score_windows(
        plan.reference, iter([Window(next(windows_of(plan)).missing.slice(0, 0), 1.0)]), listener=heard
    )
    assert outcome.sequences == 0
    assert heard.lines == ["nothing to score: every sequence is in the store; no engine is started"]


def test_a_store_that_cannot_be_written_is_said_before_an_engine_starts(plan, monkeypatch):
    monkeypatch.setattr("pipeline.store.local_places.LocalPlace.why_not_writable", lambda _: "read-only")
    monkeypatch.setattr(OpenedReference, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(
        RefscoreError, match=r"24 sequences and more must be scored, but the store cannot be written \(read-only\)"
    ):
        score_windows(plan.reference, windows_of(plan))


@pytest.mark.parametrize("stop", [RefscoreError, KeyboardInterrupt])
def test_what_goes_wrong_in_planning_comes_out_and_no_thread_is_left(plan, stop):
    first, _ = in_parts(plan, [0.5, 1.0])

    def windows():
        yield first
        raise stop("row 7 is torn")

    before, heard = threading.active_count(), Heard()
    with pytest.raises(stop, match="row 7 is torn"):
        score_windows(plan.reference, windows(), listener=heard)
    assert threading.active_count() == before
    # what was planned before is scored
    assert 24 - len(plan.store.lookup(plan.keys).missing) == 12
    assert any("stopped: 12 of about 24 sequences" in line for line in heard.lines) == (stop is KeyboardInterrupt)


def test_an_interrupted_engine_stops_planning_too(plan, monkeypatch):
    first, second = in_parts(plan, [0.5, 1.0])
    closed = threading.Event()

    def windows():
        try:
            yield first
            yield second
            yield from in_parts(plan, [1.0])
        finally:
            closed.set()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.precompute.launch.score_shards", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        score_windows(plan.reference, windows())
    assert closed.wait(5)
    assert threading.active_count() == before
