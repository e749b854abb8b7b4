"""The worker pool handles every piece once, retries after the loss of a worker, and never retries permanent errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from waiting import wait_for

from focus_ray.cluster.capacity import ClusterCapacity
from focus_ray.cluster.pool import FailedPiece, WorkerPool
from focus_ray.cluster.resource_wait import MAX_WAIT_S, ResourceWait
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, StorageError, TrainingError

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file


MAX_RETRIES = 3


@dataclass(frozen=True)
class Job:
    name: str
    place: Path


def make_capacity(num_workers: int, is_private: bool = True) -> ClusterCapacity:
    """Returns the capacity of the cluster of the tests for at most `num_workers` workers."""
    return ClusterCapacity(ClusterConfig(), is_private, limit=num_workers)


def run_jobs(function: Callable[[Job], Any], names: str, place: Path, **options: Any) -> dict[str, Any]:
    """Returns the result of each job, or the reason why it failed."""
    jobs = iter([Job(name, place) for name in names])
    pool = WorkerPool[Job](make_capacity(2), {"num_cpus": 1}, MAX_RETRIES, lambda text: None, **options)
    return {
        job.name: outcome.reason if isinstance(outcome, FailedPiece) else outcome
        for job, outcome in pool.run_pieces(function, lambda: next(jobs, None))
    }


def list_attempts(place: Path) -> list[str]:
    """Returns the names of all attempts in alphabetical order."""
    return sorted(file.name.partition("-")[0] for file in place.iterdir())


def record_attempt(job: Job) -> int:
    """Writes a file for this attempt and returns the number of the attempt."""
    number = list_attempts(job.place).count(job.name)
    (job.place / f"{job.name}-{number}").write_text("")
    return number


def work_or_die(job: Job) -> bool:
    if record_attempt(job) == 0 and job.name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def test_the_piece_of_a_lost_worker_is_repeated_and_the_others_are_not(ray_cluster: None, tmp_path: Path) -> None:
    assert run_jobs(work_or_die, "abcde", tmp_path, runs_trainers=True) == dict.fromkeys("abcde", True)
    assert list_attempts(tmp_path) == ["a", "b", "b", "c", "d", "e"]


def work_or_fail(job: Job) -> None:
    number = record_attempt(job)
    if job.name == "b":
        raise DataError("no such image")
    if job.name == "c" and number < 2:
        raise StorageError("S3 is away")
    if job.name == "d":
        raise RuntimeError("always")


def test_permanent_errors_are_not_retried_but_storage_errors_are(ray_cluster: None, tmp_path: Path) -> None:
    outcomes = run_jobs(work_or_fail, "abcd", tmp_path)
    assert outcomes["b"] == "DataError: no such image"
    assert outcomes["d"] == f"RuntimeError: always ({MAX_RETRIES + 1} attempts)"
    assert (outcomes["a"], outcomes["c"]) == (None, None)
    assert list_attempts(tmp_path) == ["a", "b", "c", "c", "c", *["d"] * (MAX_RETRIES + 1)]


def test_the_end_of_the_loop_stops_the_workers(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    jobs = iter([Job(name, tmp_path) for name in "ab"])
    for _ in WorkerPool[Job](make_capacity(1), {"num_cpus": 1}, 0, print).run_pieces(
        record_attempt, lambda: next(jobs, None)
    ):
        break
    num_cpus = ray.cluster_resources()["CPU"]
    wait_for(lambda: ray.available_resources().get("CPU") == num_cpus, 60, "the CPU of the worker")
    assert list_attempts(tmp_path)[0] == "a"


OTHER_RUN = """
import ray, sys
ray.init(address=sys.argv[1], logging_level="error")
@ray.remote(num_cpus=1)
class Worker:
    def work(self):
        return "done"
print(ray.get(Worker.remote().work.remote()), flush=True)
"""


@pytest.mark.cluster
def test_a_run_gives_way_to_a_run_that_waits(ray_cluster: None) -> None:
    import ray

    messages: list[str] = []
    pieces = iter(range(600))
    pool = WorkerPool[int](make_capacity(4, is_private=False), {"num_cpus": 1}, 0, messages.append)
    other: subprocess.Popen[str] | None = None
    for number, _ in pool.run_pieces(lambda piece: time.sleep(0.5), lambda: next(pieces, None)):
        if number == 4:  # the workers hold all four CPUs
            address = ray.get_runtime_context().gcs_address
            other = subprocess.Popen([sys.executable, "-c", OTHER_RUN, address], stdout=subprocess.PIPE, text=True)
        if other is not None and other.poll() is not None:
            break  # the other run ended while this run still had work
    assert other is not None
    assert other.communicate(timeout=60)[0] == "done\n"
    assert "another run waits for resources: one worker is stopped for it" in messages


def test_waiting_is_reported_each_minute_and_has_a_limit(ray_cluster: None) -> None:
    now, messages = [0.0], []
    wait = ResourceWait(make_capacity(2), messages.append, clock=lambda: now[0])
    for now[0] in range(0, 241, 10):
        wait.check(num_starting=2)
    assert len(messages) == 4
    assert re.fullmatch(r"waiting for 2 x \(1 CPU\) for 4 min; the cluster has 4 CPU, .*", messages[-1])
    wait.check(num_starting=2, is_working=True)  # too early after the last check
    now[0] += 10
    wait.check(num_starting=2, is_working=True)
    now[0] += MAX_WAIT_S - 10
    wait.check(num_starting=2)
    now[0] += 10
    with pytest.raises(TrainingError, match="at most 24 h"):
        wait.check(num_starting=2)
