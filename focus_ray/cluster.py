"""Joining or starting a Ray cluster, and asking whether it can ever hold what a run needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from focus_ray.config import ClusterConfig
from focus_ray.errors import TrainingError


def connect(num_cpus: int | None = None) -> bool:
    """Joins the cluster of RAY_ADDRESS or of the job that runs this, or starts a private one on this machine.

    Returns: whether the cluster is private to this process.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    import ray

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every line twice
    # a bare ray.init would join whatever cluster a killed driver left in /tmp/ray (seen with Ray 2.60)
    # without the dashboard Train cannot tell that a controller lives, warns every second, and may leak placement groups
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=True, dashboard_host="127.0.0.1", logging_level="warning"
    )
    return True


def has_gpus() -> bool:
    import ray

    return float(ray.cluster_resources().get("GPU", 0)) > 0


def uses_gpu(config: ClusterConfig) -> bool:
    """Resolves cluster.use_gpu=auto against the cluster."""
    return has_gpus() if config.use_gpu == "auto" else bool(config.use_gpu)


def concurrent_runs(
    config: ClusterConfig, private: bool, streams: bool = False, log: Callable[[str], None] = lambda message: None
) -> int:
    """How many categories fit side by side.

    Args:
        private: whether the cluster is this process's own, and so cannot grow.
        streams: whether images are streamed: what reads them needs a CPU beside the workers'. Without one, workers and
            stream wait for each other for ever (seen with Ray 2.60).

    Raises: TrainingError: not even one ever will, on a cluster that cannot grow.
    """
    import ray

    resources: dict[str, Any] = ray.cluster_resources()
    needs = {"CPU": config.num_workers * config.cpus_per_worker + streams}
    if uses_gpu(config):
        needs["GPU"] = float(config.num_workers)
    fits = min(int(resources.get(kind, 0) // amount) for kind, amount in needs.items())
    if fits == 0:
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in needs.items())
        there = ", ".join(f"{resources.get(kind, 0):g} {kind}" for kind in needs)
        beside = " and the stream of images" if streams else ""
        advice = "lower cluster.num_workers or cluster.cpus_per_worker" + (
            ", raise data.memory_budget_mb so that nothing is streamed" if streams else ""
        )
        message = f"{config.num_workers} worker(s){beside} need {wanted}"
        if private:
            raise TrainingError(
                f"{message}, this machine has {there}: {advice}, or set RAY_ADDRESS to a larger cluster"
            )
        log(f"WARNING: {message}, the cluster has {there}: waiting for it to grow; otherwise stop, and {advice}")
    limit = config.max_concurrent_categories
    return max(1, fits if limit is None else min(fits, limit))
