"""What every peer is measured by, in its own process and environment: nothing here imports focus_ray.

A peer gives five functions of one method; `time_peer` times them and prints one JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.perf_counter()


def read_specification() -> dict[str, Any]:
    """method, image lists (train, good, bad), masks, weights, size_px, singles, batches."""
    return dict(json.loads(Path(sys.argv[1]).read_text()))


def read_memory_mb() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class MemoryPeak:
    """The highest resident memory while it is open."""

    def __init__(self) -> None:
        self.highest = read_memory_mb()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.highest = max(self.highest, read_memory_mb())


def measure_median_ms(act: Callable[[], object], times: int) -> float:
    for _ in range(3):
        act()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return 1e3 * sorted(taken)[len(taken) // 2]


def time_peer(
    imported_s: float,
    fit: Callable[[], object],
    test: Callable[[], dict[str, float | None]],
    one_ready: Callable[[], object],
    one_file: Callable[[str], object],
    many_ready: Callable[[], object],
) -> None:
    """Times a peer's functions and prints the figures as JSON.

    test gives image_auroc, pixel_auroc and aupro; many_ready scores 32 images.
    """
    asked = read_specification()
    base = read_memory_mb()
    with MemoryPeak() as peak:
        start = time.perf_counter()
        fit()
        fit_s = time.perf_counter() - start
        start = time.perf_counter()
        figures = test()
        test_s = time.perf_counter() - start
    files = (asked["good"] + asked["bad"])[: asked["singles"]]
    ready_ms = measure_median_ms(one_ready, asked["singles"])
    names = iter(files * 10)
    file_ms = measure_median_ms(lambda: one_file(next(names)), asked["singles"])
    batch_ms = measure_median_ms(many_ready, asked["batches"])
    print(
        json.dumps(
            {
                "import_s": imported_s,
                "fit_s": fit_s,
                "test_s": test_s,
                "one_ready_ms": ready_ms,
                "one_file_ms": file_ms,
                "per_s_32": 32e3 / batch_ms,
                "memory_mb": peak.highest - base,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                **figures,
            }
        )
    )
