"""A line now and then of a long step: how much is done, how fast, how long it will take. Plain lines, for a job's log too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

FIRST_S = 5.0  # a step that is shorter says nothing
_GROWTH = 0.25  # of the time that has passed, until the next line: a step of an hour tells about twenty


class Progress:
    """Tells how far something is, after `FIRST_S` and then ever more rarely."""

    def __init__(
        self,
        what: str,
        total: int,
        log: Callable[[str], None],
        *,
        unit: str = "images",
        clock: Callable[[], float] = time.monotonic,
        done: int = 0,
    ) -> None:
        """total: units in all, 0 where it is not known.  done: units before the first that is told."""
        self.what, self.total, self.log, self.unit, self.clock = what, total, log, unit, clock
        self.start, self.done, self.before, self._due = clock(), done, done, FIRST_S

    def add(self, count: int = 1) -> None:
        """So many units more are done."""
        self.done += count
        passed = self.clock() - self.start
        if passed >= self._due and self.done:
            self.log(f"{self.what}: {words(self.done, self.total, passed, self.unit, self.before)}")
            self._due = passed + max(FIRST_S, _GROWTH * passed)


def track(
    items: Iterable[T],
    what: str,
    total: int,
    log: Callable[[str], None],
    *,
    unit: str = "images",
    count: Callable[[T], int] = lambda item: 1,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Gives the items on, and tells how far they are as `Progress` does.

    Args:
        total: units in all, 0 where it is not known.  count: units of an item, 1 unless told.
    """
    progress = Progress(what, total, log, unit=unit, clock=clock)
    for item in items:
        yield item
        progress.add(count(item))


def words(done: int, total: int, passed_s: float, unit: str, before: int = 0) -> str:
    """'120 of 320 images, 31/s, 6 s left'. before: of those done, how many were when the time began."""
    rate = (done - before) / max(passed_s, 1e-9)
    shown = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
    if done >= total:
        return f"{done} {unit}, {shown}"
    return f"{done} of {total} {unit}, {shown}, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """'45 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
