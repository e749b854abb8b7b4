"""Measurements for tests of attacks: memory of the service's processes, waits of another client; and the service as a command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from places import REPOSITORY, free_port
from waiting import wait_for

NOISE_S = 0.05  # other programs delay a single request by as much without any attack
SERVE = re.compile(rb"ray::(ServeReplica|ProxyActor)")


def find_serve_processes() -> dict[int, bool]:
    """Finds the processes of Ray Serve below this process, and their children, which decode images.

    Returns:
        Process id -> whether it is a process of Serve itself.
    """
    parents: dict[int, int] = {}
    serve: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if SERVE.match((folder / "cmdline").read_bytes()):
                serve.add(pid)
        except OSError:  # the process has ended
            continue

    def list_ancestors(pid: int) -> Iterator[int]:
        while pid > 1:
            yield pid
            pid = parents.get(pid, 0)

    lines = {pid: set(list_ancestors(pid)) for pid in parents}
    return {pid: pid in serve for pid, line in lines.items() if os.getpid() in line and line & serve}


class MemoryMonitor:
    """Follows the memory of all processes of Ray Serve and their children while the context lasts.

    growth_mb: at the end, by how many MiB the sum of their peaks exceeds their memory at the start.
    """

    def __init__(self) -> None:
        self.growth_mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat)

    def __enter__(self) -> MemoryMonitor:
        self._first = find_serve_processes()
        for pid in self._first:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        self._start_mb = sum(map(read_peak_memory_mb, self._first))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._measure_growth()
        lost = {pid for pid, is_serve in self._first.items() if is_serve} - find_serve_processes().keys()
        assert kind or not lost, f"processes of Serve have ended: {sorted(lost)}"

    def _repeat(self) -> None:
        while not self._stop.wait(0.1):
            self._measure_growth()

    def _measure_growth(self) -> None:
        self.growth_mb = max(self.growth_mb, sum(map(read_peak_memory_mb, find_serve_processes())) - self._start_mb)


def read_peak_memory_mb(pid: int) -> float:
    """Largest resident memory of a process since its start, or since its peak was cleared; 0 for one that has ended."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(match[1]) / 1024 if match else 0.0


class RequestProbe:
    """Repeats a request of another client while the context lasts, and keeps its times.

    Args:
        request: sends one request; an exception ends the probe and is raised at the end of the context.
        pause_s: between two requests.
    """

    def __init__(self, request: Callable[[], object], pause_s: float = 0.02) -> None:
        self.request, self.pause_s = request, pause_s
        self.times_s: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat)
        self._failure: BaseException | None = None

    def __enter__(self) -> RequestProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _repeat(self) -> None:
        try:
            while not self._stop.is_set():
                start = time.perf_counter()
                self.request()
                self.times_s.append(time.perf_counter() - start)
                self._stop.wait(self.pause_s)
        except BaseException as error:
            self._failure = error

    def wait_for(self, num_requests: int, limit_s: float = 60.0) -> None:
        """Waits for a number of answers, or for a failure. Raises: AssertionError: not in time."""
        wait_for(
            lambda: len(self.times_s) >= num_requests or not self._thread.is_alive(),
            limit_s,
            f"{num_requests} answers to the probe",
        )


def compare_waiting_times(
    request: Callable[[], object],
    attack: Callable[[threading.Event], object],
    num_attackers: int = 2,
    num_rounds: int = 3,
    num_requests: int = 100,
) -> tuple[float, float]:
    """Compares how long a client waits without and with an attack, in turn, so that other load of the machine meets both.

    Args:
        request: sends one request of the client.
        attack: sends requests until the event is set.
        num_requests: of the client, in each half of a round.

    Returns:
        The 0.99 quantiles of the client's waits in seconds: without and with the attack.
    """
    quiet_s: list[float] = []
    busy_s: list[float] = []
    for _ in range(num_rounds):
        with RequestProbe(request) as probe:
            probe.wait_for(num_requests)
        quiet_s += probe.times_s
        stop = threading.Event()
        with ThreadPoolExecutor(num_attackers) as pool, RequestProbe(request) as probe:
            attackers = [pool.submit(attack, stop) for _ in range(num_attackers)]
            try:
                probe.wait_for(num_requests)
            finally:
                stop.set()
        busy_s += probe.times_s
        for attacker in attackers:
            attacker.result()
    quiet, busy = float(np.quantile(quiet_s, 0.99)), float(np.quantile(busy_s, 0.99))
    print(
        f"p99 of {len(quiet_s)} requests without the attack {quiet:.3f} s, of {len(busy_s)} with it {busy:.3f} s; "
        f"medians {np.median(quiet_s):.3f} and {np.median(busy_s):.3f} s; load of the machine {os.getloadavg()[0]:.1f}"
    )
    return quiet, busy


@contextmanager
def run_serve_command(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Runs `focus-ray serve` with its own Ray until the context ends; yields its URL once it is ready.

    Interrupts the command at the end of the context, and asserts that it then ends with exit status 0.

    Args:
        words: place and settings.
        environment: additional variables.
    """
    port, folder = free_port(), tempfile.mkdtemp(prefix="fr-", dir="/tmp")  # short: Ray keeps Unix sockets there
    url, log = f"http://127.0.0.1:{port}", Path(folder, "log")
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "focus_ray.cli", "serve", *words, f"--port={port}"],
            env={**os.environ, **(environment or {}), "RAY_TMPDIR": folder},
            cwd=REPOSITORY,
            stdout=sink,
            stderr=sink,
        )

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return httpx.get(f"{url}/readyz", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(is_ready, 180.0, "the service is ready", 0.5)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()[-4000:]
        assert "stopping: requests in flight" in log.read_text()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
