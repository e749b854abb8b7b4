"""The worker pool handles every piece once, retries after the loss of a worker, and never retries permanent errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from waiting import wait_for

from focus_ray.cluster.capacity import ClusterCapacity
from focus_ray.cluster.pool import FailedPiece, WorkerPool
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, StorageError

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file


MAX_RETRIES = 3


@dataclass(frozen=True)
class Job:
    name: str
    place: Path


def make_capacity(num_workers: int) -> ClusterCapacity:
    """Returns the capacity of the private cluster of the tests for at most `num_workers` workers."""
    return ClusterCapacity(ClusterConfig(), is_private=True, limit=num_workers)


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
