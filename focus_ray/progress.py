"""A line now and then of a long step: how much is done, how fast, how long it will take. Plain lines, for a job's log too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

FIRST_S = 5.0  # a step that is shorter says nothing
_GROWTH = 0.25  # of the time that has passed, until the next line: a step of an hour tells about twenty


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
    """Gives the items on, and tells how far they are after `FIRST_S` and then ever more rarely.

    Args:
        total: units in all, 0 where it is not known.  count: units of an item, 1 unless told.
    """
    start, done, due = clock(), 0, FIRST_S
    for item in items:
        yield item
        done += count(item)
        passed = clock() - start
        if passed >= due and done:
            log(f"{what}: {words(done, total, passed, unit)}")
            due = passed + max(FIRST_S, _GROWTH * passed)


def words(done: int, total: int, passed_s: float, unit: str) -> str:
    """'120 of 320 images, 31/s, 6 s left'."""
    rate = done / max(passed_s, 1e-9)
    shown = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
    if done >= total:
        return f"{done} {unit}, {shown}"
    return f"{done} of {total} {unit}, {shown}, {duration((total - done) / rate)} left"


def duration(seconds: float) -> str:
    """'45 s', '3 min', '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
