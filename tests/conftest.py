"""What tests share: threads, a private place for Ray, the S3 server, real images and weights where they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# before torch or Ray is imported, and inherited by every process that a test starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # short tails of training runs
os.environ.pop("RAY_ADDRESS", None)  # never a cluster that someone else runs
# short: Ray keeps Unix sockets below it, whose paths may have 107 characters
_RAY_FOLDER = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="fr-", dir="/tmp" if os.path.isdir("/tmp") else None)

import pytest
from hypothesis import settings
from places import SHARED
from s3_server import s3, s3_server  # noqa: F401

settings.register_profile("focus_ray", deadline=None)  # a busy machine is no failure
settings.load_profile("focus_ray")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes Ray's folder once everything that used it has ended."""
    shutil.rmtree(_RAY_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"real images and weights are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def resnet18_weights(shared: Path) -> Path:
    """ImageNet weights of ResNet-18's layers 1 to 3, batch norm folded: right in evaluation mode only."""
    path = shared / "weights" / "resnet18_imagenet_layers1-3_bnfolded.pth"
    if not path.is_file():
        pytest.skip(f"there are no weights at {path}")
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private local cluster with four CPUs, whatever the machine has, for all tests marked `ray`."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    try:
        yield
    finally:
        if mine:
            ray.shutdown()
