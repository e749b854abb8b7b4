"""What is read of Ray's private parts, each behind one function; read in Ray 2.60.0, and looked for when a cluster is joined.

No public call tells any of it. A new version that has moved a part fails at once and by name, not later and in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from focus_ray.errors import TrainingError

READ_IN = "2.60.0"
KINDS = ("CPU", "GPU", "memory")
# what is needed of it -> module and dotted attribute that must be there
PARTS = {
    "what the autoscaler can bring": ("ray._private.state", "state.get_max_resources_from_cluster_config"),
    "which node this is": ("ray._private.worker", "_global_node"),
    "which cluster runs on this machine": ("ray._private.services", "canonicalize_bootstrap_address"),
    "the session's folder": ("ray._private.node", "Node.get_session_dir_path"),
    "which failures are tried again": ("ray.train.v2.api.data_parallel_trainer", "create_failure_policy"),
    "which variables its actors are told": ("ray.train.v2._internal.constants", "ENV_VARS_TO_PROPAGATE"),
    "whether a token is asked for": ("ray._raylet", "Config.initialize"),
    "which token is sent": ("ray._raylet", "AuthenticationTokenLoader.get_token_for_http_header"),
    "a cluster's Python version": ("ray.job_submission", "JobSubmissionClient._do_request"),
}


def check_private_parts(parts: dict[str, tuple[str, str]] = PARTS) -> None:
    """Looks whether all parts are where they were; nothing is called.

    Raises: TrainingError: the installed Ray has moved one.
    """
    import ray

    for what, (module, path) in parts.items():
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            raise TrainingError(
                f"Ray {ray.__version__} has no {module}:{path}, which tells {what}; it was there in Ray {READ_IN}: install "
                f"that version (pip install 'ray=={READ_IN}'), or a newer focus_ray"
            ) from None


def autoscaler_limits() -> dict[str, float]:
    """What the autoscaler has told Ray that it can bring; empty where there is none."""
    from ray._private.state import state

    told = state.get_max_resources_from_cluster_config()
    return {kind: float(amount) for kind, amount in (told or {}).items() if kind in KINDS}


def find_local_cluster() -> str | None:
    """HOST:PORT of the cluster that RAY_ADDRESS=auto means, which need not live any more; None without one."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None


def session_folder() -> Path:
    """The folder of this node's Ray session."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def tell_trainers_their_cluster() -> None:
    """Lets the actors of trainers that this process makes from now on ask the cluster that they are in.

    Train's placement group cleaner asks the state API whether its controller lives, and names no cluster: with two on a
    machine its thread dies with a traceback, and cleans nothing.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def cluster_metadata(client: Any) -> dict[str, Any]:
    """What a cluster says of itself through its Jobs API: rayVersion and pythonVersion among it. Raises: as requests."""
    ask: Callable[..., Any] = client._do_request
    answer = ask("GET", "/api/v0/cluster_metadata")
    answer.raise_for_status()
    return dict(answer.json()["data"])


def require_token() -> None:
    """Makes the cluster that this process starts next refuse requests without a token, of whatever machine.

    Ports of a private cluster listen on all interfaces. A mode, a token or a token file that the user has set stays; without a
    token a random one is made, which this process and its children alone know.
    """
    raylet: Any = importlib.import_module("ray._raylet")  # compiled: it has no types

    if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() != "token":
        return
    loader = raylet.AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray reads both variables when it is imported
    raylet.Config.initialize("")
    loader.reset_cache()


def is_token_refused(channel: Any, timeout_s: float) -> bool:
    """Whether a server of Ray behind a gRPC channel refuses the token that this process would send, or the lack of one."""
    import grpc

    raylet: Any = importlib.import_module("ray._raylet")  # compiled: it has no types
    from ray.exceptions import AuthenticationError

    loader = raylet.AuthenticationTokenLoader.instance()
    ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
    try:
        headers = loader.get_token_for_http_header() if loader.has_token() else {}
        ask(b"", timeout=timeout_s, metadata=tuple(headers.items()))
    except AuthenticationError:  # mode token without any token
        return True
    except grpc.RpcError as error:
        return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def remove_working_folders(experiment: str) -> None:
    """Removes what a Tune experiment has left on the node that runs this."""
    for folder in (session_folder() / "artifacts").glob(f"*/{experiment}*"):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another experiment's may be there
            folder.parent.rmdir()
