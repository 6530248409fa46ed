"""Attempts at groups: whose a group is, whether that process still lives, and what is left of it after a failure.

A group is first scored whole. If that attempt fails, because the process died, hung, or the engine broke down, the next one goes
prompt by prompt and notes at which it is: a prompt at which it fails too is left out by name, and the job goes on.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pipeline.artifacts.writer import Writer, has_ended, this_process
from pipeline.errors import RefscoreError
from pipeline.precompute.many.job import PLAN, Job

log = logging.getLogger(__name__)

# seconds between two signs of life; without one for so long a process counts as dead, wherever it ran
_BEAT, _DEAD_AFTER = 15.0, 120.0
# seconds between two looks for groups when every one is taken
_LOOK = 2.0
# so many groups in a row that others took since they were listed: time to list them again
_TAKEN = 8
_SCORING, _PUBLISHING, _FAILED, _GIVEN_UP = "scoring", "publishing", "failed", "given up"


@dataclass
class Attempt:
    """An attempt at a group that is this process's own. `failed_at`: of every earlier attempt that failed while the engine had it,
    the first row of the prompt at which it was, None if that was the whole group.
    """

    job: Job
    group: str
    number: int
    failed_at: list[int | None]
    note: dict[str, Any]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def live(self) -> None:
        """Leave word that this process lives."""
        self._tell()

    def scores(self, row: int | None) -> None:
        """The engine has the group, or of it the prompt whose first row this is: if it ends here, that is why."""
        self._tell(state=_SCORING, at=row)

    def publishes(self) -> None:
        """The engine is through with the group."""
        self._tell(state=_PUBLISHING)

    def failed(self) -> None:
        """It failed, if the engine had it: the next one need not wait until this process counts as dead."""
        self._tell(state=_FAILED if self.note.get("state") == _SCORING else _GIVEN_UP)

    def give_up(self) -> None:
        """Leave the group to others; nothing is wrong with it."""
        self._tell(state=_GIVEN_UP)

    def _tell(self, **facts: Any) -> None:
        with self._lock:
            self.note.update(facts, beat=self.note.get("beat", 0) + 1)
            self.job.put(_claim(self.group, self.number), self.note)


def next_attempt(job: Job, group: str) -> Attempt:
    """An attempt at a group of which the earlier ones are known to be over."""
    earlier: list[dict[str, Any]] = []
    while True:
        if attempt := _attempt(job, group, earlier):
            return attempt
        earlier.append(job.read(_claim(group, len(earlier) + 1)))


@contextmanager
def planning(job: Job, reference_id: str, **facts: Any) -> Iterator[None]:
    """Make the job, and leave word within the block that this process lives: without it nobody would know that no more comes.
    `facts` stand in its plan too.
    """
    note: dict[str, Any] = {**facts, "who": asdict(this_process("plans a job")), "beat": 0}
    job.begin(reference_id, **note)

    def live() -> None:
        note["beat"] += 1
        job.put(PLAN, {"reference_id": reference_id, **note})

    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(ended, live), name="signs of life", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()


class Claims:
    """Attempts at groups of a job, for one of several processes that know nothing of one another; a context manager.

    What is in hand when the context is left is given up.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._held: dict[str, Attempt] = {}
        self._seen: dict[str, tuple[dict[str, Any], float]] = {}
        self._ended = threading.Event()
        self._beating = threading.Thread(
            target=_beat, args=(self._ended, self._live), name="signs of life", daemon=True
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beating.join()
        for attempt in self._held.values():
            attempt.give_up()

    def attempts(self) -> Iterator[Attempt]:
        """One attempt after the other, until every group is done, by whomever.

        Raises RefscoreError if the process that plans is gone before it was through, and all that it planned is done.
        """
        while not self._ended.is_set():
            of_all, done, numbers = self._job.groups(), set(self._job.names("done")), self._numbers()
            if of_all is not None and len(done) >= of_all:
                return
            with self._lock:
                left = [group for group in self._job.names("missing") if group not in done and group not in self._held]
            if of_all is None and not left:
                self._must_be_planned()
                log.info(
                    "all that was planned by now is taken: waiting for 'refscore precompute --plan-to' to plan more"
                )
            # those that nobody has come first, from a place of this process's own on, so that two seldom want the same
            start = random.randrange(len(left) + 1)  # noqa: S311  # nothing secret
            taken = 0
            for group in sorted([*left[start:], *left[:start]], key=lambda group: group in numbers):
                if attempt := self._claim(group, numbers.get(group, 0)):
                    taken = 0
                    yield attempt
                elif group not in numbers and (taken := taken + 1) >= _TAKEN:
                    break
            else:
                self._ended.wait(_LOOK)

    def end(self, attempt: Attempt) -> None:
        """The attempt is over: its group is done, or it failed."""
        with self._lock:
            del self._held[attempt.group]

    def _claim(self, group: str, number: int) -> Attempt | None:
        earlier = [self._job.read(_claim(group, one)) for one in range(1, number + 1)]
        if earlier and not self._is_over(_claim(group, number), earlier[-1]):
            return None
        # it may be done since it was listed, by one whose claim is as old
        attempt = None if earlier and self._job.result(group) else _attempt(self._job, group, earlier)
        if attempt is not None:
            with self._lock:
                self._held[group] = attempt
        return attempt

    def _numbers(self) -> dict[str, int]:
        """The number of the last attempt at each group that has one."""
        found: dict[str, int] = {}
        for name in self._job.names("claims"):
            group, _, number = name.rpartition(".")
            found[group] = max(found.get(group, 0), int(number))
        return found

    def _must_be_planned(self) -> None:
        """Raise RefscoreError if no more is planned, and nobody has said so."""
        try:
            note = self._job.read(PLAN)
        except FileNotFoundError:
            note = {"state": _GIVEN_UP}
        if self._is_over(PLAN, note) and self._job.groups() is None:
            raise RefscoreError(
                f"what {self._job.place} holds is scored, but the process that planned it is gone before it was through: the same "
                "'refscore precompute --plan-to' with another place plans what is left, or 'refscore precompute' scores it"
            )

    def _is_over(self, name: str, note: dict[str, Any]) -> bool:
        """Whether nobody works on it: it says so, its process is gone, or it has given no sign of life for long.

        By this process's own clock: that of another machine may be another.
        """
        if note.get("state") in (_FAILED, _GIVEN_UP) or _is_gone(note):
            return True
        known = self._seen.get(name)
        if known is None or known[0] != note:
            self._seen[name] = known = (note, time.monotonic())
        return time.monotonic() - known[1] > _DEAD_AFTER

    def _live(self) -> None:
        with self._lock:
            held = list(self._held.values())
        for attempt in held:
            attempt.live()


def _beat(ended: threading.Event, live: Callable[[], None]) -> None:
    while not ended.wait(_BEAT):
        try:
            live()
        except RefscoreError as error:
            # it may be written again the next time; a thread that ended would let this process pass for dead
            log.warning("no sign of life could be left: %s", error)


def _is_gone(note: dict[str, Any]) -> bool:
    """Whether the process that it names has ended, as far as that can be known here."""
    try:
        return bool(has_ended(Writer(**note["who"])))
    except (KeyError, TypeError):
        return False


def _claim(group: str, number: int) -> str:
    return f"claims/{group}.{number}.json"


def _attempt(job: Job, group: str, earlier: list[dict[str, Any]]) -> Attempt | None:
    """The attempt that follows `earlier` ones; None if somebody else has it."""
    number, note = len(earlier) + 1, {"who": asdict(this_process("scores a group"))}
    if not job.put_new(_claim(group, number), note):
        return None
    failed_at = [one.get("at") for one in earlier if one.get("state") in (_SCORING, _FAILED)]
    return Attempt(job, group, number, failed_at, note)
