"""All uses of private functions of Ray 2.60.0, each in one function of this module.

Ray has no public functions for these purposes. `check_private_attributes` runs when a cluster is joined. So a new version of Ray
without such a function fails at once with a clear message.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from focus_ray.cluster.failures import is_retryable
from focus_ray.errors import TrainingError

T = TypeVar("T")

RAY_VERSION = "2.60.0"
RESOURCE_KINDS = ("CPU", "GPU", "memory")
_NUM_REPORT_ATTEMPTS, _REPORT_PAUSE_S = 10, 1.0  # to read the first report of the autoscaler
# purpose -> module and dotted attribute that must exist
PRIVATE_ATTRIBUTES = {
    "the labels of nodes": ("ray._raylet", "node_labels_match_selector"),
    "the limits of the autoscaler": ("ray._private.state", "state.get_max_resources_from_cluster_config"),
    "the free resources of nodes": ("ray._private.state", "available_resources_per_node"),
    "the actors that wait for resources": ("ray._private.state", "actors"),
    "the state of the autoscaler": ("ray.autoscaler.v2.sdk", "get_cluster_status"),
    "the report of the autoscaler": ("ray._private.ray_constants", "DEBUG_AUTOSCALING_STATUS"),
    "the current node": ("ray._private.worker", "_global_node"),
    "the cluster of this machine": ("ray._private.services", "canonicalize_bootstrap_address"),
    "the session folder": ("ray._private.node", "Node.get_session_dir_path"),
    "the policy of retries": ("ray.train.v2.api.data_parallel_trainer", "create_failure_policy"),
    "the environment variables of actors": ("ray.train.v2._internal.constants", "ENV_VARS_TO_PROPAGATE"),
    "the requirement of a token": ("ray._raylet", "Config.initialize"),
    "the token mode": ("ray._raylet", "get_authentication_mode"),
    "the token of a request": ("ray._raylet", "AuthenticationTokenLoader.get_token_for_http_header"),
    "the Python version of a cluster": ("ray.job_submission", "JobSubmissionClient._do_request"),
}


def check_private_attributes(attributes: dict[str, tuple[str, str]] = PRIVATE_ATTRIBUTES) -> None:
    """Checks that the installed Ray has all private functions that focus_ray uses, without calling them.

    Args: attributes: purpose -> (module, dotted attribute).

    Raises: TrainingError: the installed Ray lacks a function.
    """
    import ray

    for purpose, (module, path) in attributes.items():
        try:
            operator.attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError):
            raise TrainingError(
                f"Ray {ray.__version__} has no {module}:{path}, which focus_ray needs for {purpose}. Install Ray {RAY_VERSION} "
                f"(pip install 'ray=={RAY_VERSION}'), or a newer focus_ray"
            ) from None


def _call_on_cluster(function: Callable[[], T]) -> T:
    """Calls a function that reads the state of the cluster: in this process, or with Ray Client (ray://) in a task."""
    import ray

    if not ray.util.client.ray.is_connected():
        return function()
    result: T = ray.get(ray.remote(num_cpus=0)(function).remote())
    return result


def read_autoscaler_limits() -> dict[str, float]:
    """Returns the limits of the autoscaler: kind of resource -> largest total of the cluster; empty without an autoscaler."""

    def read_limits() -> dict[str, float] | None:
        from ray._private.state import state

        return state.get_max_resources_from_cluster_config()  # type: ignore[no-any-return]

    limits = _call_on_cluster(read_limits)
    return {kind: float(amount) for kind, amount in (limits or {}).items() if kind in RESOURCE_KINDS}


def has_autoscaler() -> bool:
    """Returns whether an autoscaler can add nodes to the cluster that this process has joined.

    Ray runs an autoscaler on every head node. Without a configuration it only observes, and names the type of each node after
    the id of the node ("node_..."). On a cluster that has just started, the function waits some seconds for the first report.
    """

    def read_node_types() -> set[str]:
        import ray
        from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.experimental.internal_kv import _internal_kv_get

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        if status.stats.autoscaler_version not in (None, "0"):  # version 2 of the autoscaler
            return {node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes]}
        report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report")  # version 1
        return set((report or {}).get("node_type_mapping", {}).values())

    for _ in range(_NUM_REPORT_ATTEMPTS):
        if node_types := _call_on_cluster(read_node_types):
            return any(not name.startswith("node_") for name in node_types)
        time.sleep(_REPORT_PAUSE_S)
    return False


def read_available_resources() -> dict[str, dict[str, float]]:
    """Returns id of a node -> its free resources: kind -> amount. A kind that is used up is missing."""

    def read_resources() -> dict[str, dict[str, float]]:
        from ray._private.state import available_resources_per_node

        return available_resources_per_node()  # type: ignore[no-any-return]

    return _call_on_cluster(read_resources)


def do_other_jobs_wait() -> bool:
    """Returns whether actors or placement groups of other jobs than this one wait for resources of the cluster."""

    def find_waiting_jobs() -> bool:
        import ray
        from ray._private.state import actors

        job = ray.get_runtime_context().get_job_id()
        waiting_actors = actors(actor_state_name="PENDING_CREATION").values()
        waiting_groups = [
            name for name, group in ray.util.placement_group_table().items() if group["state"] == "PENDING"
        ]
        return any(actor["JobID"] != job for actor in waiting_actors) or any(
            not name.endswith(job) for name in waiting_groups
        )

    return _call_on_cluster(find_waiting_jobs)


def labels_match_selector(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Returns whether the labels of a node satisfy a label selector, by the rules of Ray's scheduler.

    Args:
        labels: name of a label -> value.
        selector: name of a label -> condition: value, !value, in(a,b) or !in(a,b).
    """
    raylet: Any = importlib.import_module("ray._raylet")  # a compiled module without types

    return bool(raylet.node_labels_match_selector(dict(labels), dict(selector)))


def find_local_cluster_address() -> str | None:
    """Returns HOST:PORT of the cluster that RAY_ADDRESS=auto names; None if there is none. The cluster may have ended."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None


def patch_ray_train_retries() -> None:
    """Changes Ray Train in this process, for all trainers that are created later: permanent errors end a training at once.

    Ray Train has no public option for this. `is_retryable` says which errors are permanent. Ray Train also counts every minute
    in which the workers wait for resources as a failure; a training may wait longer, until `ResourceWait` ends the run. Requires
    a connection to a cluster.

    The function also sets RAY_ADDRESS to the address of the cluster, in this process and in the actors of a trainer. The
    placement group cleaner of Ray Train asks the state API whether its controller is alive, without naming a cluster. With two
    clusters on a machine, its thread would die with a traceback and clean nothing.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
    from ray.train.v2.api import data_parallel_trainer

    class PermanentFailurePolicy(DefaultFailurePolicy):
        """Ray's retry policy, except that permanent errors are never retried, and waiting for resources is no failure."""

        def make_decision(self, training_failed_error: Any) -> Any:
            """See `DefaultFailurePolicy.make_decision`: Ray's decision, but permanent errors and waiting are decided here."""
            if not is_retryable(training_failed_error):
                return FailureDecision.RAISE
            failure = getattr(training_failed_error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupTimeoutError):
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    data_parallel_trainer.create_failure_policy = PermanentFailurePolicy
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def fetch_cluster_metadata(client: Any) -> dict[str, Any]:
    """Returns metadata of a cluster from its Jobs API, such as rayVersion and pythonVersion.

    Args: client: a `JobSubmissionClient`.

    Raises: requests.RequestException: the request fails.
    """
    answer = client._do_request("GET", "/api/v0/cluster_metadata")
    answer.raise_for_status()
    return dict(answer.json()["data"])


def require_private_cluster_token() -> None:
    """Makes the next private cluster of this process refuse requests without a secret token.

    If the user set RAY_AUTH_MODE to another value than token, does nothing. Otherwise sets RAY_AUTH_MODE=token and, if there is
    no token yet, RAY_AUTH_TOKEN to a random token, which only this process and its children know. Without a token, strangers
    could use the cluster, because the ports of a private cluster listen on all network interfaces.
    """
    raylet: Any = importlib.import_module("ray._raylet")  # a compiled module without types

    if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() != "token":
        return
    loader = raylet.AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray reads both variables at import, so it must read them again
    raylet.Config.initialize("")
    loader.reset_cache()


def is_token_refused(channel: Any, timeout_s: float) -> bool:
    """Returns whether the Ray server behind a gRPC channel refuses the token of this process, or requires a missing token.

    If the server does not answer, the result is False.
    """
    import grpc

    raylet: Any = importlib.import_module("ray._raylet")  # a compiled module without types
    from ray.exceptions import AuthenticationError

    loader = raylet.AuthenticationTokenLoader.instance()
    try:
        headers = loader.get_token_for_http_header() if loader.has_token() else {}
    except AuthenticationError:  # mode "token" without a token
        return True
    # of the GCS, and of the server of Ray Client (ray://); each knows only its own method, and checks no token for another
    for method in ("/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"):
        try:
            channel.unary_unary(method)(b"", timeout=timeout_s, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
    return False


def describe_token_problem() -> str:
    """Returns why a cluster refuses the requests of this process, and which variables to set."""
    raylet: Any = importlib.import_module("ray._raylet")  # a compiled module without types

    has_token = raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    variables = "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with"
    if raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN:
        if has_token:
            return f"the cluster requires a token, and the token of this process is wrong: set {variables}"
        return (
            f"with RAY_AUTH_MODE=token, this process has no token: set {variables}, "
            "or unset RAY_AUTH_MODE for a cluster without tokens"
        )
    # `ray start` requires a token as soon as ~/.ray/auth_token exists, but an explicit RAY_ADDRESS does not read this file
    if has_token:
        return (
            "the cluster requires a token, and Ray sends the token of this machine to RAY_ADDRESS only with "
            f"RAY_AUTH_MODE=token: set it. If the cluster has another token, also set {variables}"
        )
    return f"the cluster requires a token: set RAY_AUTH_MODE=token, and {variables}"


def remove_tune_folders(experiment: str) -> None:
    """Deletes the working folders, on this node, of all Ray Tune experiments whose names begin with `experiment`."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for folder in (session / "artifacts").glob(f"*/{experiment}*"):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder may contain another experiment
            folder.parent.rmdir()
