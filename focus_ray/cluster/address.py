"""Checks whether a Ray cluster answers at an address, because Ray itself would wait for minutes."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from focus_ray.cluster.ray_private import describe_token_problem, find_local_cluster_address, is_token_refused

TIMEOUT_S = 4.0
ANSWER_TIMEOUT_S = 20.0  # a busy head node accepts connections at once, but answers later


def find_cluster_problem(address: str) -> str:
    """Checks within 25 s whether a Ray cluster answers at an address. Returns the reason if not, an empty string if it answers.

    For the address local nothing is checked, because Ray then starts a cluster.

    Args:
        address: value of RAY_ADDRESS: HOST:PORT, ray://HOST:PORT, auto or local.
    """
    if address == "local":
        return ""
    host_and_port = find_local_cluster_address() if address == "auto" else address.removeprefix("ray://")
    if host_and_port is None:
        return "no cluster runs on this machine"
    return find_connection_problem(host_and_port) or _find_grpc_problem(host_and_port, is_token_known=address != "auto")


def _find_grpc_problem(host_and_port: str, is_token_known: bool) -> str:
    """Checks whether a server speaks gRPC as Ray does, and accepts the token. Returns the problem; an empty string for none.

    With TLS (RAY_USE_TLS) nothing is checked.

    Args:
        host_and_port: address of the server.
        is_token_known: whether this process already has the token that Ray would send. False skips the check of the token.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return ""  # a check would need Ray's certificates
    import grpc

    options = [("grpc.enable_http_proxy", 0)]  # Ray ignores proxies too
    with grpc.insecure_channel(host_and_port, options=options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return f"a server accepts connections there, but does not answer as Ray does within {ANSWER_TIMEOUT_S:g} s"
        if is_token_known and is_token_refused(channel, ANSWER_TIMEOUT_S):
            return describe_token_problem()
    return ""


def read_last_cluster_address() -> str | None:
    """Returns the address of the cluster that was started last on this machine; None if Ray recorded no cluster.

    The cluster may have ended since.
    """
    try:
        text = (find_ray_sessions_root() / "ray_current_cluster").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return text or None


def find_ray_sessions_root() -> Path:
    """Returns the folder in which Ray makes a subfolder for each of its sessions on this machine, by the same rule as Ray."""
    parent = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp"
    return Path(parent) / "ray"


def find_connection_problem(host_and_port: str) -> str:
    """Tries to connect to HOST:PORT, for at most `TIMEOUT_S` seconds. Returns why it fails; an empty string if it succeeds."""
    try:
        parts = urlsplit(f"//{host_and_port}")
        if not parts.hostname or not parts.port:
            raise ValueError
        socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S).close()
    except ValueError:  # also of urlsplit and its port
        return "not an address: give HOST:6379, ray://HOST:10001 or auto"
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    return ""
