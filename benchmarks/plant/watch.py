"""What a command costs: seconds, the memory of its processes, what it asked of S3."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plant.server import StorageServer

ROOT = Path(__file__).resolve().parents[2]
_LOOK_S = 0.5


def make_settings(arguments: argparse.Namespace, root: str) -> list[str]:
    """The default but for alignment, on small images: what is asked here is what the system costs, not how well it sees."""
    return [
        "default",
        "name=plant",
        f"data.uri={root}/data",
        f"storage={root}/runs",
        f"model.weights={arguments.weights}",
        f"model.image_size_px={arguments.size}",
        "model.image_alignment.group=none",
        "cluster.local=false",
        "cluster.use_gpu=false",
    ]


def read_private_memory_mb(pid: int) -> float:
    """Memory of a process that no other shares, MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def list_descendants(pid: int) -> list[int]:
    """The process and all that stand below it."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        below.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        waiting += below.get(one, [])
    return found


class MemoryPeaks:
    """The highest private memory of a command's own process, and of any other below `root`, while it is open, MiB."""

    def __init__(self, command: int, root: int) -> None:
        self.command, self.root = command, root
        self.driver_mb = self.largest_mb = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_LOOK_S):
            self.driver_mb = max(self.driver_mb, read_private_memory_mb(self.command))
            for pid in list_descendants(self.root):
                try:
                    ours = b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if ours and pid != self.command:
                    self.largest_mb = max(self.largest_mb, read_private_memory_mb(pid))


def measure_command(arguments: Sequence[str], log: Path, accept: Sequence[int] = (0,)) -> dict[str, Any]:
    """Runs a focus-ray command as a user would. Raises: SystemExit: it failed; with where its output is."""
    before = StorageServer.counts()
    start = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "focus_ray.cli", *arguments], stdout=stream, stderr=stream, cwd=ROOT
        )
        with MemoryPeaks(process.pid, os.getpid()) as peaks:
            status = process.wait()
    seconds = time.perf_counter() - start
    if status not in accept:
        raise SystemExit(f"focus-ray {' '.join(arguments)} ended with {status}: {log}")
    asked = StorageServer.counts() - before
    requests = {kind: count for kind, count in asked.items() if not kind.startswith("bytes")}
    return {
        "command": arguments[0],
        "seconds": round(seconds, 1),
        "driver_mb": round(peaks.driver_mb),
        "largest_worker_mb": round(peaks.largest_mb),
        "requests": requests,
        "received_mb": round(asked["bytes received"] / 2**20, 1),
        "sent_mb": round(asked["bytes sent"] / 2**20, 1),
    }
