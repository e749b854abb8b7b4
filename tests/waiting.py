"""Waiting in tests: for something to become true, or a process to get somewhere, with a limit and a reason."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from focus_ray.sweep.records import read_records


def wait_for(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.1) -> None:
    """Asks until the condition holds. Raises: AssertionError: it did not in time; it says what was awaited."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)


def wait_for_records(root: str, count: int, process: subprocess.Popen[str], timeout_s: float) -> None:
    """Until a sweep that runs as a process has so many records."""

    def there() -> bool:
        assert process.poll() is None, process.communicate()
        return len(read_records(root)) >= count

    wait_for(there, timeout_s, f"{count} trial(s) of {root}")
