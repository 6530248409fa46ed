"""One of several engines: it scores groups of a job one after the other, and publishes each itself.

An engine that breaks down is started again; one that does not answer takes its process with it, and the group is tried again by
whoever comes next.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.tables import arrays_of
from pipeline.config.experiment import ReferenceConfig
from pipeline.engines.growing import Growing
from pipeline.engines.protocol import Request
from pipeline.engines.quarantine import score_each
from pipeline.errors import RefscoreError, first_line
from pipeline.hardware import device_kind, return_freed_memory
from pipeline.precompute.many.attempts import Attempt
from pipeline.precompute.many.job import Job, Result
from pipeline.precompute.score import Target, lengths_in, requests_in, tokens_in
from pipeline.progress import duration

log = logging.getLogger(__name__)

# after so many failures what is left of a group is left out whole
_MOST_FAILURES = 8
# failures in a row, without one sequence scored between them, after which it is asked whether the engine scores anything
_IN_A_ROW = 3
# minutes without an answer after which an engine hangs, unless the configuration says how many
_HANGS_AFTER = {"cpu": 240.0, "cuda": 30.0}
# seconds more for an engine that keeps Python from running
_GRACE = 60.0


@dataclass(frozen=True)
class InHand:
    """A group in hand: `rows` of it are to be scored, and keys (hex) that are not, and why."""

    attempt: Attempt
    whole: pa.Table
    rows: pa.Table
    left_out: dict[str, str]


class Worker:
    """Groups of `job`, with `engine`. `score` must be called by one thread alone, the others by any."""

    def __init__(self, job: Job, target: Target, engine: Growing) -> None:
        self._job, self._target, self._engine = job, target, engine
        self._seconds = 60 * minutes_until_it_hangs(target.reference.config)
        self._failures = 0
        _sweep_hung()

    def take(self, attempt: Attempt) -> InHand:
        """Read the group; after another attempt without what is published by now, after a failure without what cannot be scored."""
        whole = rows = self._job.missing(attempt.group)
        left_out: dict[str, str] = {}
        if attempt.number > 1:
            rows = rows.take(pa.array(self._target.store.lookup(rows["key"].combine_chunks()).missing))
        if attempt.failed_at:
            bad = _prompts_at(whole, attempt.failed_at)
            every = len(attempt.failed_at) > _MOST_FAILURES
            fails = [every or prompt in bad for prompt in _prompts(rows)]
            why = f"a worker died, hung or broke down while it scored this prompt, {len(attempt.failed_at)} times with its group"
            left_out = {key.hex(): why for key in rows.filter(pa.array(fails, pa.bool_()))["key"].to_pylist()}
            rows = rows.filter(pa.array([not one for one in fails], pa.bool_()))
        return InHand(attempt, whole, rows, left_out)

    def score(self, group: InHand) -> list[np.ndarray] | None:
        """The scores of its rows; None if the engine broke down over them, and the group is to be tried again.

        Raises RefscoreError for what is no fault of a group: scores that cannot be true, too little memory, an engine that breaks
        down over everything.
        """
        scores: list[np.ndarray] = []
        try:
            if len(group.rows):
                with answering(self._seconds, group.attempt):
                    self._engine.ready(int(lengths_in(group.rows).max()))
            for first, part in _parts(group) if len(group.rows) else ():
                group.attempt.scores(first)
                with answering(self._seconds, group.attempt):
                    scores += score_each(self._engine, requests_in(part))
                self._failures = 0
        except RefscoreError:
            raise
        except Exception as error:  # noqa: BLE001  # engines have errors of their own
            self._failures += 1
            group.attempt.failed()
            log.warning(
                "the engine broke down (%s): it is started again, and the group scored again", first_line(error)
            )
            self._engine.close()
            if self._failures >= _IN_A_ROW:
                self._must_score_something(group, error)
                self._failures = 0
            return None
        finally:
            # activations of ever other sizes leave holes that glibc keeps
            return_freed_memory()
        return scores

    def _must_score_something(self, group: InHand, error: Exception) -> None:
        """Raise RefscoreError if the engine, started anew, scores not even a token: then it is no fault of the sequences."""
        (row,) = group.rows.slice(0, 1).to_pylist()
        try:
            with answering(self._seconds, group.attempt):
                self._engine.ready(int(lengths_in(group.rows).max()))
                self._engine.score([Request(row["prompt_ids"][:1], row["response_ids"][:1])])
        except RefscoreError:
            raise
        except Exception:  # noqa: BLE001  # of whatever kind: the first one is said
            raise RefscoreError(
                f"the engine broke down {_IN_A_ROW} times in a row ({first_line(error)}), and over a single token too: nothing of "
                "these groups is stored. 'refscore doctor' looks at this machine; reference.engine=transformers is another engine"
            ) from error

    def publish(self, group: InHand, scores: list[np.ndarray]) -> Result:
        """Publish the scores and record that the group is done."""
        group.attempt.publishes()
        quarantined = self._target.publish(group.rows, scores) if len(group.rows) else {}
        left_out = group.left_out | {key.hex(): why for key, why in quarantined.items()}
        failures = len(group.attempt.failed_at)
        result = Result(len(group.whole), tokens_in(group.whole), left_out, failures)
        return self._job.finish(group.attempt.group, result)

    def finish(self) -> None:
        """No more groups come: have the store's index speak of what was published."""
        self._target.store.finish()


def minutes_until_it_hangs(reference: ReferenceConfig) -> float:
    """After how many minutes without an answer an engine counts as one that hangs."""
    return reference.hangs_after or _HANGS_AFTER[device_kind()]


@contextmanager
def answering(seconds: float, attempt: Attempt) -> Iterator[None]:
    """End this process if the block takes longer: an engine that hangs can be stopped in no other way.

    Where it hung is written to a file in data/cache.
    """
    path = durable.CACHE / f"hung-{os.getpid()}-{durable.machine()}.txt"
    durable.make_directory(path.parent)
    with path.open("w", encoding="utf-8") as file:
        timer = threading.Timer(seconds, _end, [seconds, attempt, file])
        timer.daemon = True
        timer.start()
        # from C: a thread that never lets go of the interpreter lets no timer run
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=file)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)


def _sweep_hung() -> None:
    """Remove the files of processes of this machine that were killed while their engine was at work: they did not hang."""
    for path in durable.CACHE.glob(f"hung-*-{durable.machine()}.txt"):
        pid = path.name.split("-")[1]
        with suppress(OSError):
            if not path.stat().st_size and not durable.lives(int(pid)):
                path.unlink()


def _end(seconds: float, attempt: Attempt, file: TextIO) -> None:
    faulthandler.dump_traceback(file)
    log.error(
        "the engine has not answered for %s and counts as hung: this process ends, and what it had in hand is scored again (%s "
        "says where it hung; reference.hangs_after is how long one waits)",
        duration(seconds), file.name,
    )  # fmt: skip
    attempt.failed()
    os._exit(1)


def _prompts_at(whole: pa.Table, rows: list[int | None]) -> set[bytes]:
    at = [row for row in rows if row is not None]
    return set(_prompts(whole.take(pa.array(at, pa.int64()))))


def _parts(group: InHand) -> Iterator[tuple[int | None, pa.Table]]:
    """All rows at once; after a failure those of one prompt at a time, each with the prompt's first row in the whole group."""
    if not group.attempt.failed_at:
        yield None, group.rows
        return
    first_of: dict[bytes, int] = {}
    for row, prompt in enumerate(_prompts(group.whole)):
        first_of.setdefault(prompt, row)
    of_prompt: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(_prompts(group.rows)):
        of_prompt.setdefault(prompt, []).append(row)
    # responses to a prompt stand together, so rows stay in order
    for prompt, rows in of_prompt.items():
        yield first_of[prompt], group.rows.take(rows)


def _prompts(table: pa.Table) -> list[bytes]:
    return [prompt.tobytes() for prompt in arrays_of(table, "prompt_ids")]
