"""The worker pool fits every category once, retries after the loss of an actor, and never retries permanent errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from small_set import draw_parts, ingest_parts, small_config

from focus_ray.bundle.bundle import find_bundles, read_manifest
from focus_ray.cluster.pool import Failed, WorkerPool, options_per_worker
from focus_ray.errors import DataError, StorageError
from focus_ray.fitting.settings import Config
from focus_ray.ingestion.ingest import ingest
from focus_ray.training.training import fits_without_trainer, train

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file


@dataclass(frozen=True)
class Job:
    category: str
    place: Path


def run(function: Callable[[Job], Any], names: Sequence[str], place: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the result of each job, and the reason of each job that failed."""
    jobs = iter([Job(name, place) for name in names])
    cluster = small_config("unused", place).cluster
    options = options_per_worker(cluster, use_gpu=False)
    with WorkerPool[Job](2, options, cluster.max_failures, lambda text: None) as pool:
        outcomes = {job.category: outcome for job, outcome in pool.run(function, lambda: next(jobs, None))}
    failed = {name: outcome.reason for name, outcome in outcomes.items() if isinstance(outcome, Failed)}
    return {name: outcome for name, outcome in outcomes.items() if name not in failed}, failed


def attempts_of(place: Path) -> list[str]:
    """Returns the names of all attempts in alphabetical order."""
    return sorted(file.name.partition("-")[0] for file in place.iterdir())


def note(job: Job) -> int:
    """Writes a file for this attempt and returns the number of the attempt."""
    number = sum(name == job.category for name in attempts_of(job.place))
    (job.place / f"{job.category}-{number}").write_text("")
    return number


def fit_or_die(job: Job) -> bool:
    if note(job) == 0 and job.category == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def test_the_category_of_a_lost_actor_is_fitted_again_and_the_others_once(ray_cluster: None, tmp_path: Path) -> None:
    assert run(fit_or_die, list("abcde"), tmp_path) == (dict.fromkeys("abcde", True), {})
    assert attempts_of(tmp_path) == ["a", "b", "b", "c", "d", "e"]


def fit_or_fail(job: Job) -> None:
    number = note(job)
    if job.category == "b":
        raise DataError("no such image")
    if job.category == "c" and number < 2:
        raise StorageError("S3 is away")
    if job.category == "d":
        raise RuntimeError("always")


def test_permanent_errors_are_not_retried_but_storage_errors_are(ray_cluster: None, tmp_path: Path) -> None:
    _, failed = run(fit_or_fail, list("abcd"), tmp_path)
    retries = small_config("unused", tmp_path).cluster.max_failures
    assert failed == {"b": "DataError: no such image", "d": f"RuntimeError: always ({retries + 1} attempts)"}
    assert attempts_of(tmp_path) == ["a", "b", "c", "c", "c", *["d"] * (retries + 1)]


def test_a_pool_gives_the_bundles_of_this_process(ray_cluster: None, tmp_path: Path) -> None:
    images = draw_parts(tmp_path / "images")
    (images / "wheel").symlink_to(images / "gear", target_is_directory=True)
    data = str(tmp_path / "data")
    ingest(images, data, categories=["gear", "wheel"], progress=False)

    def config(name: str, **cluster: Any) -> Config:
        sections = {"data": {"uri": data, "categories": ["gear", "wheel"]}, "cluster": {"use_gpu": False, **cluster}}
        return small_config(data, tmp_path, **sections).model_copy(update={"name": name})

    pooled, local = config("pooled", local=False), config("here", local=True)
    assert fits_without_trainer(pooled)
    said: list[str] = []
    train(pooled, log=said.append)
    train(local)
    assert "2 categories, 2 at a time, 1 worker(s) each" in said
    bundles_of_runs = [find_bundles(str(tmp_path / name)) for name in ("pooled", "here")]
    assert [list(bundles) for bundles in bundles_of_runs] == [["gear", "wheel"]] * 2
    for category in ("gear", "wheel"):
        pooled_manifest, local_manifest = (read_manifest(bundles[category]) for bundles in bundles_of_runs)
        assert pooled_manifest["files"]["network"]["sha256"] == local_manifest["files"]["network"]["sha256"]
        assert pooled_manifest["calibration"]["image_threshold"] == pytest.approx(
            local_manifest["calibration"]["image_threshold"], rel=1e-5
        )


def test_epochs_or_several_workers_need_a_trainer(tmp_path: Path) -> None:
    data = ingest_parts(tmp_path)
    assert not fits_without_trainer(small_config(data, tmp_path, train={"epochs": 1}))
    assert not fits_without_trainer(small_config(data, tmp_path, cluster={"num_workers": 2}))
