"""What the tests of attacks measure: memory of the service's processes, and how long another client waits."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SERVE = re.compile(rb"ray::(ServeReplica|ProxyActor)")


def serve_memory_mb() -> dict[int, float]:
    """Resident memory of each process of Ray Serve below this process: process id -> MiB."""
    parents: dict[int, int] = {}
    memory: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes().rstrip(b"\0 ")
            if SERVE.match(title):
                pages = int((folder / "statm").read_text().split()[1])
                memory[pid] = pages * PAGE_BYTES / 2**20
        except OSError:  # the process has ended
            continue

    def is_own(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return {pid: mb for pid, mb in memory.items() if is_own(pid)}


def memory_growth_mb(before: dict[int, float]) -> float:
    """The largest growth of one process since `serve_memory_mb` was `before`; the end of a process is an error.

    Raises: AssertionError: a process of `before` is gone.
    """
    now = serve_memory_mb()
    assert now.keys() >= before.keys(), f"gone: {sorted(before.keys() - now.keys())}"
    return max(now[pid] - before[pid] for pid in before)


class Probe:
    """Repeats a request of another client while the context lasts, and keeps its times.

    Args:
        request: sends one request; an exception ends the probe and is raised at the end of the context.
        pause_s: between two requests.
    """

    def __init__(self, request: Callable[[], object], pause_s: float = 0.02) -> None:
        self.request, self.pause_s = request, pause_s
        self.times_s: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._failure: BaseException | None = None

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                start = time.perf_counter()
                self.request()
                self.times_s.append(time.perf_counter() - start)
                self._stop.wait(self.pause_s)
        except BaseException as error:
            self._failure = error

    def quantile_s(self, share: float) -> float:
        """A quantile of the times in seconds. Raises: ValueError: there are none."""
        if not self.times_s:
            raise ValueError("the probe has no answer: let the context last longer")
        return float(np.quantile(self.times_s, share))


def idle_quantile_s(request: Callable[[], object], share: float = 0.99, duration_s: float = 3.0) -> float:
    """The quantile of a request's times without any other load."""
    with Probe(request) as probe:
        time.sleep(duration_s)
    return probe.quantile_s(share)
