"""Joins or starts a Ray cluster."""

from __future__ import annotations

import os
import sys
from typing import Any

from focus_ray.cluster.address import find_cluster_problem
from focus_ray.cluster.messages import is_verbose
from focus_ray.cluster.ray_private import check_private_attributes, require_private_cluster_token
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import TrainingError


def runs_without_ray(config: ClusterConfig) -> bool:
    """Returns whether the work runs in this process without Ray.

    With cluster.local=true or false, returns this value. With auto, returns whether nothing requires Ray. These things require
    Ray: the variable RAY_ADDRESS, a connection to Ray, several workers, node labels, and several categories at the same time.

    Raises: TrainingError: cluster.local=true and cluster.num_workers above 1.
    """
    if config.local != "auto":
        if config.local and config.num_workers > 1:
            raise TrainingError(
                f"cluster.local=true trains in this process alone, but cluster.num_workers={config.num_workers}: "
                "set one of the two"
            )
        return config.local
    ray = sys.modules.get("ray")
    has_cluster = bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())
    needs_cluster = config.num_workers > 1 or config.labels or (config.max_concurrent_categories or 1) > 1
    return not (has_cluster or needs_cluster)


def connect_to_ray(num_cpus: int | None = None, namespace: str | None = None) -> bool:
    """Joins the Ray cluster of RAY_ADDRESS, or starts a private cluster on this machine if RAY_ADDRESS is unset or local.

    If this process has already joined or started a cluster, nothing is started and the result is False. Inside a Ray job,
    RAY_ADDRESS names the cluster of the job. To join a cluster that requires a token, the user sets RAY_AUTH_MODE=token, and
    RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Sets these environment variables unless the user has set them: RAY_TRAIN_HEALTH_CHECK_INTERVAL_S; for a private cluster also
    RAY_USAGE_STATS_ENABLED, RAY_TRAIN_ENABLE_PRINT_PATCH and the token variables (`require_private_cluster_token`).

    Args:
        num_cpus: number of CPUs of a new private cluster; None: all.
        namespace: namespace of named actors; None: a new namespace for this process.

    Returns: whether a cluster was started that is private to this process.

    Raises: TrainingError: the installed Ray lacks a private function that focus_ray uses, or Ray does not start or answer.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")
    import ray

    check_private_attributes()
    if ray.is_initialized():
        return False
    if (address := os.environ.get("RAY_ADDRESS", "")) not in ("", "local"):
        failure = f"the Ray cluster at RAY_ADDRESS={address} does not answer"
        if reason := find_cluster_problem(address):
            raise TrainingError(
                f"{failure} ({reason}): check that the cluster runs, or unset RAY_ADDRESS to start a private Ray on this machine"
            )
        _init_ray(failure, namespace=namespace)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # otherwise every line is shown twice
    require_private_cluster_token()
    # ray.init without address would join a cluster that a killed driver left in /tmp/ray (seen with Ray 2.60). Without the
    # dashboard, Ray Train cannot detect that a controller is alive, warns every second, and may leak placement groups.
    _init_ray(
        "Ray does not start on this machine",
        address="local",
        num_cpus=num_cpus,
        namespace=namespace,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
    )
    return True


def _init_ray(failure: str, **settings: Any) -> None:
    """Calls `ray.init`. Ray shows its log and the output of workers only with `--verbose`.

    Args:
        failure: beginning of the error message.
        settings: further arguments of `ray.init`.

    Raises: TrainingError: Ray does not start.
    """
    import ray

    try:
        ray.init(logging_level="warning" if is_verbose() else "error", log_to_driver=is_verbose(), **settings)
    except Exception as error:  # Ray raises many types, with messages of many lines
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"{failure}: {type(error).__name__}: {reason[:300]}; a busy machine may need longer: try again with fewer "
            "programs on it, or raise RAY_raylet_start_wait_time_s"
        ) from error
