"""Joining or starting a Ray cluster, and what of it a worker asks for."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from focus_ray.cluster.address import ADVICE, why_no_cluster
from focus_ray.cluster.messages import is_verbose
from focus_ray.cluster.ray_private import KINDS, autoscaler_limits, check_private_parts, require_token
from focus_ray.config import ClusterConfig
from focus_ray.errors import TrainingError


def runs_here(config: ClusterConfig) -> bool:
    """Whether one worker in this process does: as asked, or where nothing calls for a cluster.

    Raises: TrainingError: it is asked for, and so are several workers.
    """
    if config.local != "auto":
        if config.local and config.num_workers > 1:
            raise TrainingError(
                f"cluster.local=true trains in this process alone, but cluster.num_workers={config.num_workers}: "
                "set one of the two"
            )
        return config.local
    ray = sys.modules.get("ray")
    joined = bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())
    asked = config.num_workers > 1 or config.labels or (config.max_concurrent_categories or 1) > 1
    return not (joined or asked)


def connect(num_cpus: int | None = None, namespace: str | None = None) -> bool:
    """Joins the cluster of RAY_ADDRESS or of the job that runs this, or starts a private one on this machine.

    A private cluster asks for a token (`require_token`). To join one that does, the user sets RAY_AUTH_MODE=token and
    RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Args:
        namespace: of named actors; None gives this process one of its own.

    Returns: whether the cluster is private to this process.

    Raises: TrainingError: the installed Ray has moved a part that is read of it, or Ray does not start or answer.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    import ray

    check_private_parts()
    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        what = f"the Ray cluster at RAY_ADDRESS={address} does not answer"
        if reason := why_no_cluster(address):
            raise TrainingError(f"{what} ({reason}): {ADVICE}")
        _init(what, namespace=namespace)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every line twice
    require_token()
    # a bare ray.init would join whatever cluster a killed driver left in /tmp/ray (seen with Ray 2.60)
    # without the dashboard Train cannot tell that a controller lives, warns every second, and may leak placement groups
    _init(
        "Ray does not start on this machine",
        address="local",
        num_cpus=num_cpus,
        namespace=namespace,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
    )
    return True


def _init(what: str, **settings: Any) -> None:
    import ray

    try:
        ray.init(logging_level="warning" if is_verbose() else "error", log_to_driver=is_verbose(), **settings)
    except Exception as error:  # of many types, with many lines
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"{what}: {type(error).__name__}: {reason[:300]}; a busy machine may need longer: try again with less running on "
            "it, or a larger RAY_raylet_start_wait_time_s"
        ) from error


def has_gpus() -> bool:
    import ray

    return float(ray.cluster_resources().get("GPU", 0)) > 0


def uses_gpu(config: ClusterConfig) -> bool:
    """Resolves cluster.use_gpu=auto against what the cluster has or can grow to."""
    return (
        ceiling_of(config, {}).get("GPU", 0.0) > 0 or has_gpus() if config.use_gpu == "auto" else bool(config.use_gpu)
    )


def resources_per_worker(config: ClusterConfig, use_gpu: bool) -> dict[str, float]:
    """What Ray keeps for a worker; memory in bytes. use_gpu: of `uses_gpu`."""
    asked = {"CPU": config.cpus_per_worker}
    if use_gpu:
        asked["GPU"] = config.gpus_per_worker
    if config.memory_gib_per_worker is not None:
        asked["memory"] = config.memory_gib_per_worker * 2**30
    return asked


def ceiling_of(config: ClusterConfig, total: Mapping[str, float]) -> dict[str, float]:
    """What the cluster can grow to; empty where it is not known to grow."""
    found: dict[str, float] = {}
    told = autoscaler_limits()
    for kind, configured in (("CPU", config.max_cpus), ("GPU", config.max_gpus)):
        amount = configured if configured is not None else told.get(kind)
        if amount is not None:
            found[kind] = max(amount, total.get(kind, 0.0))
    if found and config.memory_gib_per_worker is not None:
        found["memory"] = told.get("memory", math.inf)  # nobody said: no reason to refuse
    return {**{kind: total.get(kind, 0.0) for kind in KINDS if kind in total}, **found} if found else {}
