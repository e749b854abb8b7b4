"""Joins or starts a Ray cluster."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from focus_ray.cluster.address import find_cluster_problem
from focus_ray.cluster.messages import is_verbose
from focus_ray.cluster.ray_private import (
    check_private_attributes,
    describe_token_problem,
    require_private_cluster_token,
)
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
    RAY_USAGE_STATS_ENABLED, RAY_TRAIN_ENABLE_PRINT_PATCH and the token variables (`require_private_cluster_token`). The
    processes of a joined cluster get all RAY_TRAIN_* variables.

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
        failure = f"cannot join the Ray cluster at RAY_ADDRESS={address}"
        if reason := find_cluster_problem(address):
            raise TrainingError(
                f"{failure}: {reason}. To start a private Ray on this machine instead, unset RAY_ADDRESS"
            )
        _init_ray(failure, namespace=namespace, runtime_env={"env_vars": _collect_train_variables()})
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
    except Exception as error:  # Ray raises many types
        raise TrainingError(f"{failure}: {_describe_init_error(error)}") from error


def _describe_init_error(error: BaseException) -> str:
    """Returns the root cause of an error of `ray.init` as one line, with advice if it is a token or a slow machine.

    Ray raises a general error, whose cause may contain a traceback as text.
    """
    from ray.exceptions import AuthenticationError

    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = lines[-1] if any(line.startswith("Traceback") for line in lines) else " ".join(lines)
    if isinstance(error, AuthenticationError) or "AuthenticationError" in text or "InvalidAuthToken" in text:
        return describe_token_problem()
    advice = ""
    if "timed out" in text.lower() or "timeout" in text.lower():
        advice = "; a busy machine may need longer: run fewer programs on it, or raise RAY_raylet_start_wait_time_s"
    return f"{type(error).__name__}: {text[:300]}{advice}"


def _collect_train_variables() -> dict[str, str]:
    """Returns the RAY_TRAIN_* variables of this process that the workers of a joined cluster do not have yet.

    Ray itself passes them on only from the process that creates a trainer, which may be a task on another node. Ray refuses a
    variable that the runtime environment of the submitted job already sets.
    """
    job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    job_variables = (job_config.get("runtime_env") or {}).get("env_vars", {})
    return {
        name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_") and name not in job_variables
    }
