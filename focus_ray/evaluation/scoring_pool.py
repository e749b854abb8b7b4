"""Workers that score images with bundles: the pool of evaluation and batch inspection."""

from __future__ import annotations

from functools import lru_cache

from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.connect import uses_gpu
from focus_ray.cluster.pool import Piece, WorkerPool, options_per_worker
from focus_ray.cluster.preflight import count_concurrent_runs
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError
from focus_ray.names import Log

MAX_LOADED_BUNDLES = 2  # per process; the previous bundle is still needed for the pictures of its category


@lru_cache(MAX_LOADED_BUNDLES)
def load_inspector(uri: str, version: str) -> Inspector:
    """Returns the inspector of a bundle. The process caches it for the next pieces.

    Args:
        version: SHA-256 of the manifest.

    Raises: BundleError: the bundle is missing or damaged.  DataError: the bundle is of another version.
    """
    inspector = Inspector.load(uri)
    if inspector.bundle.version != version:
        raise DataError(f"{uri}: the bundle was replaced after the run began: run again")
    return inspector


def scoring_pool(num_workers: int | None, is_private: bool, log: Log) -> WorkerPool[Piece]:
    """Returns a pool on the cluster that this process has joined.

    Args:
        num_workers: None takes as many as the cluster has room for.
        is_private: whether the cluster belongs to this process alone.

    Raises: TrainingError: the cluster has no room for a worker.
    """
    config = ClusterConfig()
    count = count_concurrent_runs(config, is_private, log=log, limit=num_workers)
    return WorkerPool(count, options_per_worker(config, uses_gpu(config)), config.max_failures, log)
