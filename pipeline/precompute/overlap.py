"""What comes next is prepared, and what came before is put away, in threads of their own, while the engine works on what is
between: it is never waited for by one of them, nor waits for both.

The engine stays in the thread that calls: it was started there, and its threads are bound to it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")
_S = TypeVar("_S")

# what is prepared and waits; one more is being prepared
_AHEAD = 1
# seconds between two looks whether anybody still waits, and for what is being prepared when nobody does any more
_LOOK, _PATIENCE = 0.1, 30.0


def overlapped(items: Iterable[_T], score: Callable[[_T], _S], put_away: Callable[[_T, _S], None]) -> None:
    """`score` each of `items` in this thread and `put_away` what it gave in another one, one at a time and in order.

    Errors of all three are raised here, with the next item at the latest. What was scored before an error, or before Ctrl-C, is
    put away.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="publishing") as other, Ahead(items) as prepared:
        under_way: Future[None] | None = None
        try:
            for item in prepared:
                scores = score(item)
                if under_way is not None:
                    under_way.result()
                under_way = other.submit(put_away, item, scores)
        finally:
            if under_way is not None:
                under_way.result()


class Ahead(Generic[_T]):
    """The items of an iterator that a thread draws, a little before they are asked for; a context manager."""

    def __init__(self, items: Iterable[_T]) -> None:
        self._items = iter(items)
        self._drawn: queue.Queue[tuple[bool, _T | BaseException | None]] = queue.Queue(_AHEAD)
        self._unwanted = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="preparing", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unwanted.set()
        self._thread.join(_PATIENCE)

    def __iter__(self) -> Iterator[_T]:
        """The items in order; raises what drawing them raised."""
        while not self._unwanted.is_set():
            try:
                is_item, drawn = self._drawn.get(timeout=_LOOK)
            except queue.Empty:
                continue
            if is_item:
                yield drawn  # type: ignore[misc]  # so marked by the thread
            elif isinstance(drawn, BaseException):
                raise drawn
            else:
                return

    def _draw(self) -> None:
        end: BaseException | None = None
        try:
            for item in self._items:
                if not self._hand_over(True, item):
                    break
        except BaseException as error:  # noqa: BLE001  # it is raised where the items are wanted
            end = error
        finally:
            # what the iterator holds, processes for instance, ends with it
            getattr(self._items, "close", lambda: None)()
        self._hand_over(False, end)

    def _hand_over(self, is_item: bool, drawn: _T | BaseException | None) -> bool:  # noqa: FBT001  # half of a pair
        while not self._unwanted.is_set():
            try:
                self._drawn.put((is_item, drawn), timeout=_LOOK)
            except queue.Full:
                continue
            return True
        return False
