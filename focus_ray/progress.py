"""Prints the progress of a long step as plain lines: images finished, images per second, remaining time.

Lines, unlike a progress bar, are also readable in the log of a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

FIRST_LINE_S = 5.0  # a shorter step prints no line
# The pause before the next line is this share of the elapsed time: a step of an hour prints about twenty lines.
_PAUSE_SHARE = 0.25


class ProgressPrinter:
    """Prints the progress of a step: the first line after `FIRST_LINE_S`, further lines in growing intervals."""

    def __init__(
        self, step: str, total: int, log: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            step: name of the step, the start of each line.
            total: images in total; 0 if the number is not known.
            log: gets each line.
            clock: returns the time in seconds.
        """
        self.step, self.total, self.log, self.clock = step, total, log, clock
        self.num_finished = 0
        self.start_s, self._next_line_s = clock(), FIRST_LINE_S

    def add_finished(self, count: int = 1) -> None:
        """Counts further finished images, and prints a line if one is due."""
        self.num_finished += count
        elapsed_s = self.clock() - self.start_s
        if elapsed_s >= self._next_line_s and self.num_finished:
            status = format_progress(self.num_finished, self.total, elapsed_s)
            self.log(f"{self.step}: {status}")
            self._next_line_s = elapsed_s + max(FIRST_LINE_S, _PAUSE_SHARE * elapsed_s)


def track_progress(
    items: Iterable[T],
    step: str,
    total: int,
    log: Callable[[str], None],
    *,
    count: Callable[[T], int] = lambda item: 1,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yields the items unchanged, and prints the progress as `ProgressPrinter` does.

    Args:
        step: name of the step, the start of each line.
        total: images in total; 0 if the number is not known.
        log: gets each line.
        count: returns the number of images of an item; the default counts 1 per item.
        clock: returns the time in seconds.
    """
    progress = ProgressPrinter(step, total, log, clock=clock)
    for item in items:
        yield item
        progress.add_finished(count(item))


def format_progress(num_finished: int, total: int, elapsed_s: float) -> str:
    """Returns the progress as a text such as '120 of 320 images, 31/s, 6 s left'.

    Args:
        num_finished: finished images.
        total: images in total; a smaller number than `num_finished` counts as not known.
        elapsed_s: time since the start of the step.
    """
    rate = num_finished / max(elapsed_s, 1e-9)
    rate_text = f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
    if num_finished >= total:
        return f"{num_finished} images, {rate_text}"
    return f"{num_finished} of {total} images, {rate_text}, {format_duration((total - num_finished) / rate)} left"


def format_duration(seconds: float) -> str:
    """Returns a duration as a text such as '45 s', '3 min' or '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
