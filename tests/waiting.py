"""Waits until a condition holds or a sweep has written records, with a timeout and a message."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from focus_ray.sweep.records import read_trial_records


def wait_for(condition: Callable[[], object], timeout_s: float, description: str, every_s: float = 0.1) -> None:
    """Polls until the condition holds. Raises: AssertionError with the description, if it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {description}"
        time.sleep(every_s)


def wait_for_records(root: str, count: int, process: subprocess.Popen[str], timeout_s: float) -> None:
    """Waits until a sweep in another process has written at least `count` records."""

    def has_records() -> bool:
        assert process.poll() is None, process.communicate()
        return len(read_trial_records(root)) >= count

    wait_for(has_records, timeout_s, f"{count} trial(s) of {root}")
