"""Settings and fixtures of all tests: threads, a private folder for Ray, the S3 server, real images and weights."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# set before torch and Ray are imported; every process that a test starts inherits these variables
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # so that training runs end quickly
os.environ.pop("RAY_ADDRESS", None)  # tests must not use an existing cluster
# short, because Ray creates Unix sockets in this folder, and their paths have at most 107 characters
_RAY_FOLDER = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="fr-", dir="/tmp" if os.path.isdir("/tmp") else None)

import pytest
from hypothesis import HealthCheck, settings
from places import SHARED
from s3_server import s3, s3_server  # noqa: F401
from shared_bundles import aligned_bundle, data, part_bundles, parts  # noqa: F401

# a test may be slow on a busy machine
settings.register_profile("focus_ray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("focus_ray")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes Ray's folder after the last test."""
    shutil.rmtree(_RAY_FOLDER, ignore_errors=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The root of a new data set."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights next to the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real images and weights are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def resnet18_weights(shared: Path) -> Path:
    """ImageNet weights of the layers 1 to 3 of ResNet-18. Batch norms are folded, so they are valid only in evaluation mode."""
    path = shared / "weights" / "resnet18_imagenet_layers1-3_bnfolded.pth"
    if not path.is_file():
        pytest.skip(f"there are no weights at {path}")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private local cluster for all tests marked `ray`. It offers four CPUs, independent of the machine."""
    import ray

    is_started_here = not ray.is_initialized()
    if is_started_here:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    try:
        yield
    finally:
        if is_started_here:
            ray.shutdown()
